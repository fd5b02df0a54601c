"""Modules imported at their first use, for files that planning a grid reads as well: torch takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Stands for the module ``name`` in a file's global names, and imports it when an attribute is asked for.

    The package lazy_loader puts a stand-in for torch into ``sys.modules`` instead. Whatever looks through the
    imported modules then loads it (``inspect.getmodule`` does), and ``"torch" in sys.modules`` no longer says
    whether torch is there. A type checker should see the real import:

        if TYPE_CHECKING:
            import torch
        else:
            torch = LazyModule("torch")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
