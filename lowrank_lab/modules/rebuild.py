"""The compressed modules of a model as plain data, and the same modules built from it without their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from lowrank_lab import modules as package
from lowrank_lab.errors import UserError
from lowrank_lab.modules.base import CompressedLinear, Replacement, is_linear, plain_parts
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.factorized import plain_linear


def describe_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By full path every module that stands in the place of one of the model's own, those within it too.

    Each has its ``kind``, what it describes, and in ``borrows`` the paths of what other modules list for it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    description = {}
    for path, module in model.named_modules():
        if isinstance(module, Replacement):
            description[path] = {"kind": module.kind, **module.describe()}
            if borrowed := module.borrowed():
                description[path]["borrows"] = {name: paths[id(lent)] for name, lent in borrowed.items()}
    return description


def _make_kinds_known() -> None:
    """Import the files of this package: the kinds that they define are known then."""
    for file in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{file.name}")


def build_modules(model: Any, modules: Mapping[str, dict[str, Any]]) -> None:
    """Put what ``describe_modules`` gave into a dense model on the meta device, in place.

    Raises UserError for a kind that is not known.
    """
    _make_kinds_known()
    for path in sorted(modules, key=lambda path: path.count(".")):  # a module before those within it
        description = {name: value for name, value in modules[path].items() if name not in ("kind", "borrows")}
        made = Replacement.of_kind(modules[path]["kind"]).empty(description, model.get_submodule(path))
        model.set_submodule(path, made)
        if isinstance(made, CompressedLinear):
            # GPT-2 sets initial weights of a block's linears from above, where it would miss theirs.
            model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True
    for path, description in modules.items():
        for name, lent in description.get("borrows", {}).items():
            model.get_submodule(path).borrow(name, model.get_submodule(lent))


def check_kinds(linear: nn.Module, path: str) -> None:
    """Raises UserError where a compressed linear, or one that it is made of, has no kind and so no description."""
    for where, part in [(path, linear), *plain_parts(linear, path)]:
        description = isinstance(part, CompressedLinear) and hasattr(part, "kind")
        if not description and (part is linear or not is_linear(part)):
            raise UserError(
                f"save=true: a checkpoint cannot hold this storage: {where} is a {type(part).__name__}, "
                "no CompressedLinear with a kind"
            )


def check_description(linear: nn.Module, like: Tensor) -> None:
    """Raises ValueError where a linear, dense or compressed, costs something else than the one that it describes.

    ``like`` (out, in) is the dense weight, without values, on the meta device.
    """
    holder = nn.Module()
    holder.linear = plain_linear(like, None)
    for path, module in linear.named_modules():
        if isinstance(module, Replacement):
            where = f"linear.{path}".removesuffix(".")
            description = json.loads(json.dumps(module.describe()))
            made = module.empty(description, holder.get_submodule(where))
            for name, lent in module.borrowed().items():
                made.borrow(name, lent)
            holder.set_submodule(where, made)
    found, description = count(linear), count(holder)
    for what in ("parameters", "bytes", "macs"):
        if getattr(found, what) != getattr(description, what):
            raise ValueError(
                f"a {type(linear).__name__} has {getattr(found, what)} {what}, "
                f"but the one that it describes has {getattr(description, what)}"
            )
