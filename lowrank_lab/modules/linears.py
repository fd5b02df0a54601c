"""The linears of a block for quantization, and the steps before them.

A compressible linear ("member") is dense, or two factors; each may have steps before it (``PreparedLinear``). Paths
are names within a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.base import (
    CompressedLinear,
    Counts,
    Replacement,
    dense_weight,
    innermost,
    plain_parts,
)
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.factorized import SharedLatent, to_plain
from lowrank_lab.modules.steps import describe_steps, empty_steps


class PreparedLinear(CompressedLinear):
    """``linear`` after ``prepare``, a Sequential of steps on its input.

    Linears with the same input share one ``prepare`` in a SharedLatent, which runs it once; one of them lists it,
    and the others borrow it (``borrows``).
    """

    kind = "prepared"
    input_part = output_part = "linear"
    online = True
    shareable = ("prepare",)

    prepare: nn.Module

    def __init__(self, prepare: nn.Module, linear: nn.Module, borrows: bool = False) -> None:
        super().__init__()
        if borrows:
            self.borrow("prepare", prepare)
        else:
            self.prepare = prepare
        self.linear = linear

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> PreparedLinear:
        return cls(nn.Sequential(*empty_steps(description["steps"])), replaced)

    def describe(self) -> dict[str, Any]:
        return {"steps": describe_steps(self.steps) if self.lists_steps else []}

    @property
    def steps(self) -> nn.Sequential:
        prepare = innermost(self.prepare, "input_part")
        assert isinstance(prepare, nn.Sequential)
        return prepare

    @property
    def lists_steps(self) -> bool:
        return "prepare" in self._modules

    def counts(self) -> Counts:
        return (count(self.prepare) if self.lists_steps else Counts()) + count(self.linear)

    def dense_weight(self) -> Tensor:
        return dense_weight(self.linear).detach().float()

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        self.linear = to_plain(self.linear, dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.prepare(x))


class NormWithSteps(Replacement):
    """A norm with ``steps`` after it: the last norm of a model, where the steps cannot be folded into lm_head."""

    kind = "norm_with_steps"
    online = True

    def __init__(self, norm: nn.Module, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.norm = norm
        self.steps = nn.Sequential(*steps)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> NormWithSteps:
        return cls(replaced, empty_steps(description["steps"]))

    def describe(self) -> dict[str, Any]:
        return {"steps": describe_steps(self.steps)}

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self.norm(x))


def linear_shapes(model: nn.Module, tower: Tower) -> list[dict[str, tuple[int, int]]]:
    """By block, the (out, in) of every compressible linear."""

    def shape(linear: nn.Module) -> tuple[int, int]:
        out, inp = dense_weight(linear).shape
        return int(out), int(inp)

    blocks = blocks_of(model, tower)
    return [{name: shape(block.get_submodule(name)) for name in tower.linears} for block in blocks]


def linears_in(block: nn.Module, members: Iterable[str]) -> list[str]:
    """The paths of the plain linears in ``members``: the members, or their factors."""
    return [path for member in members for path, _ in plain_parts(block.get_submodule(member), member)]


def is_factored(block: nn.Module, member: str) -> bool:
    """Whether a member consists of two linears, with a latent between them."""
    module = block.get_submodule(member)
    return innermost(module, "input_part") is not innermost(module, "output_part")


def factor_paths(model: nn.Module) -> dict[str, list[str]]:
    """The paths of all ``left`` and of all ``right`` factors in ``model``; one that is shared is listed once."""
    found: dict[str, list[str]] = {"left": [], "right": []}
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear) and module.input_part != module.output_part:
            for side, name in (("right", module.input_part), ("left", module.output_part)):
                if name in module.parts():
                    found[side] += [where for where, _ in plain_parts(module.parts()[name], f"{path}.{name}")]
    return found


def shared_inputs(block: nn.Module, tower: Tower, members: Iterable[str]) -> list[list[str]]:
    """The paths of ``linears_in``, grouped by their input."""
    members, groups = list(members), []
    latents: dict[str, list[str]] = {}
    for inputs in tower.inputs:
        present = [member for member in inputs if member in members]
        groups.append(list(dict.fromkeys(input_side(block, member) for member in present)))
        for member in present:
            if is_factored(block, member):
                latents.setdefault(input_side(block, member), []).append(output_side(block, member))
    return [group for group in [*groups, *latents.values()] if group]


def input_side(block: nn.Module, member: str) -> str:
    """The path of the linear that reads a member's input: the member, or its right factor."""
    return _path_of(block, innermost(block.get_submodule(member), "input_part"))


def output_side(block: nn.Module, member: str) -> str:
    """The path of the linear that gives a member's output: the member, or its left factor."""
    return _path_of(block, innermost(block.get_submodule(member), "output_part"))


def _path_of(block: nn.Module, linear: nn.Module) -> str:
    return next(path for path, module in block.named_modules() if module is linear)


def set_steps(block: nn.Module, group: list[str], steps: Iterable[nn.Module]) -> None:
    """Add ``steps`` directly before all linears of a group of ``shared_inputs``, after existing steps."""
    parent = block.get_submodule(group[0].rpartition(".")[0])
    if isinstance(parent, PreparedLinear):
        parent.steps.extend(steps)
        return
    prepare: nn.Module = nn.Sequential(*steps)
    if len(group) > 1:
        prepare = SharedLatent(prepare, len(group))
    for number, path in enumerate(group):
        block.set_submodule(path, PreparedLinear(prepare, block.get_submodule(path), borrows=number > 0))


def steps_of(block: nn.Module, path: str) -> nn.Sequential:
    """The steps before the linear at ``path``; an empty Sequential where there are none."""
    parent = block.get_submodule(path.rpartition(".")[0])
    return parent.steps if isinstance(parent, PreparedLinear) else nn.Sequential()


def change_weight(block: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the weight (out, in) of a plain linear by ``change(weight)``, in float64 and of the same shape."""
    linear: Any = block.get_submodule(path)
    weight = dense_weight(linear).detach()
    changed = change(weight.double()).to(weight.dtype)
    assert changed.shape == weight.shape
    linear.weight.data = (changed.T if isinstance(linear, Conv1D) else changed).contiguous()


def change_bias(block: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """The same for its bias (out,); nothing where it has none."""
    linear: Any = block.get_submodule(path)
    if linear.bias is not None:
        linear.bias.data = change(linear.bias.detach().double()).to(linear.bias.dtype)


def make_plain(block: nn.Module, members: Iterable[str], dtype: torch.dtype) -> None:
    """Replace all parts of ``members`` that are stored in another way by plain linears of the same values.

    So a quantization can round them. Raises SkippedCell for a storage that does not allow it.
    """
    for member in members:
        block.set_submodule(member, to_plain(block.get_submodule(member), dtype))
