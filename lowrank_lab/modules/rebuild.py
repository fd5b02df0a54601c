"""The compressed modules of a model as plain data, and the same modules built from it without their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from lowrank_lab import modules as package
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.default_dtype import default_dtype
from lowrank_lab.modules.base import CompressedLinear, Replacement, is_linear, plain_parts
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.factorized import plain_linear


def describe_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By full path every module that replaces one of the model's original modules, and replacements within it.

    Each has its ``kind``, its description, and in ``borrows`` the paths of modules that another one lists for it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    description = {}
    for path, module in model.named_modules():
        if isinstance(module, Replacement):
            description[path] = {"kind": module.kind, **module.describe()}
            if borrowed := module.borrowed():
                description[path]["borrows"] = {name: paths[id(shared)] for name, shared in borrowed.items()}
    return description


def register_kinds() -> None:
    """Import the files of this package, which registers the kinds that they define."""
    for file in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{file.name}")


def build_modules(model: Any, modules: Mapping[str, dict[str, Any]]) -> None:
    """Build the modules of ``describe_modules`` in a dense model on the meta device, in place.

    It has all their tensors then; before a forward ``set_up_modules`` is needed too.
    Raises UserError for a kind that is not known.
    """
    for path in sorted(modules, key=lambda path: path.count(".")):  # a module before those within it
        description = {name: value for name, value in modules[path].items() if name not in ("kind", "borrows")}
        parent, _, name = path.rpartition(".")
        replaced = getattr(model.get_submodule(parent), name, None)
        replacement = Replacement.of_kind(modules[path]["kind"]).empty(description, replaced)
        model.set_submodule(path, replacement)
        owner = model.get_submodule(parent)
        # transformers initializes a parent: GPT-2 the weights of its linears, which it would not find here;
        # GPT-Neo the buffers that no checkpoint has, which would stay without values.
        if isinstance(replacement, CompressedLinear) and not owner._non_persistent_buffers_set:
            owner._is_hf_initialized = True
    for path, description in modules.items():
        for name, shared in description.get("borrows", {}).items():
            model.get_submodule(path).borrow(name, model.get_submodule(shared))


def set_up_modules(model: Any, modules: Mapping[str, dict[str, Any]]) -> None:
    """Have ``model`` use the modules of ``build_modules``."""
    for kind in {description["kind"] for description in modules.values()}:
        Replacement.of_kind(kind).set_up(model)


def check_kinds(linear: nn.Module, path: str) -> None:
    """Raises UserError where a compressed linear, or a part of it, has no kind and so no description."""
    for module_path, part in [(path, linear), *plain_parts(linear, path)]:
        description = isinstance(part, CompressedLinear) and hasattr(part, "kind")
        if not description and (part is linear or not is_linear(part)):
            raise UserError(
                f"save=true: a checkpoint cannot hold this storage: {module_path} is a {type(part).__name__}, "
                "no CompressedLinear with a kind"
            )


def check_description(linear: nn.Module, like: Tensor) -> None:
    """Raises ValueError where the counts of a linear, dense or compressed, differ from those of its description.

    ``like`` (out, in) is the dense weight, without values, on the meta device.
    """
    container = nn.Module()
    container.linear = plain_linear(like, None)
    with default_dtype(like.dtype):  # as transformers has it where it builds the modules of a checkpoint
        for path, module in linear.named_modules():
            if isinstance(module, Replacement):
                module_path = f"linear.{path}".removesuffix(".")
                description = json.loads(json.dumps(module.describe()))
                replacement = module.empty(description, container.get_submodule(module_path))
                for name, shared in module.borrowed().items():
                    replacement.borrow(name, shared)
                container.set_submodule(module_path, replacement)
    found, description = count(linear), count(container)
    for what in ("parameters", "bytes", "macs"):
        if getattr(found, what) != getattr(description, what):
            raise ValueError(
                f"a {type(linear).__name__} has {getattr(found, what)} {what}, "
                f"but the one that it describes has {getattr(description, what)}"
            )
