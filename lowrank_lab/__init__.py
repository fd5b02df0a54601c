"""Low-rank compression of language models: one harness, every method, fair numbers.

After ``import lowrank_lab``, transformers' ``from_pretrained`` loads the checkpoints that it saves.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_QUANTIZERS = "transformers.quantizers.auto"  # where transformers keeps the kinds of checkpoints that it loads


def _register() -> None:
    importlib.import_module("lowrank_lab.checkpoints.checkpoint")


# Registering with transformers takes importing that module, and with it torch: seconds, which neither a finished
# grid nor a mistake on the command line should cost. transformers has no lighter place for it and no entry points,
# so it is done right after transformers itself first imports the module, which it does before it can load a model.
class _RegisterWithQuantizers(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithQuantizers())
