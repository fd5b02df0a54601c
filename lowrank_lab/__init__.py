"""Low-rank compression of language models: one harness, every method, fair numbers.

After ``import lowrank_lab``, transformers' ``from_pretrained`` loads the checkpoints that it saves.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_lab.api import compress, evaluate, results, table

__all__ = ["compress", "evaluate", "results", "table"]
__version__ = "0.1.0"

# By the modules in which transformers keeps the kinds of models and of quantizations that it knows: the module of
# ours that adds to them.
_REGISTERING = {
    "transformers.models.auto.configuration_auto": "lowrank_lab.checkpoints.auto_config",
    "transformers.quantizers.auto": "lowrank_lab.checkpoints.checkpoint",
}


def __getattr__(name: str) -> Any:
    """The functions of api.py, which is imported when one is used: the command line does not need it."""
    if name in __all__:
        return getattr(importlib.import_module("lowrank_lab.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Registering with transformers takes importing these modules, and with them torch: seconds, which neither a
# finished grid nor a mistake on the command line should cost. transformers has no lighter place for it and no entry
# points, so it is done right after transformers itself first imports each, as it does before it can load a model.
class _RegisterWithTransformers(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTERING:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_REGISTERING[fullname])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _RegisterWithTransformers())
for _theirs, _ours in _REGISTERING.items():
    if _theirs in sys.modules:
        importlib.import_module(_ours)
