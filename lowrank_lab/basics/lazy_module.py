"""Modules that are imported at their first use, for files that a plan of a grid imports: torch takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Replaces the module ``name`` in a file's global names, and imports it at the first access to an attribute.

    The package lazy_loader puts such an object for torch into ``sys.modules`` instead. Code that iterates over the
    imported modules then loads torch (``inspect.getmodule`` does), and ``"torch" in sys.modules`` no longer says
    whether torch is loaded. A type checker should see the real import:

        if TYPE_CHECKING:
            import torch
        else:
            torch = LazyModule("torch")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
