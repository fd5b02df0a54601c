"""The linears of a block that a quantization speaks of, and what stands in front of them.

A compressible linear ("member") is dense, or two factors; each may have steps in front (``PreparedLinear``). Paths
are names within a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.models.families import Tower
from lowrank_lab.modules.factorized import FactorizedLinear, SharedLatent, dense_weight, plain_linear
from lowrank_lab.modules.mixed import MixedLinear


class PreparedLinear(nn.Module):
    """``linear`` on what ``prepare``, a Sequential of steps, makes of the input.

    Linears that are given the same input share one ``prepare`` in a SharedLatent, which runs it once; only the one
    that ``leads`` lists it.
    """

    prepare: nn.Module

    def __init__(self, prepare: nn.Module, linear: nn.Module, leads: bool = True) -> None:
        super().__init__()
        if leads:
            self.prepare = prepare
        else:
            self.__dict__["prepare"] = prepare
        self.linear = linear

    @property
    def steps(self) -> nn.Sequential:
        prepare = self.prepare.linear if isinstance(self.prepare, SharedLatent) else self.prepare
        assert isinstance(prepare, nn.Sequential)
        return prepare

    @property
    def leads(self) -> bool:
        return "prepare" in self._modules

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.prepare(x))


class Followed(nn.Module):
    """A norm with ``steps`` after it: the last norm of a model whose lm_head cannot take them over."""

    def __init__(self, norm: nn.Module, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.norm = norm
        self.steps = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self.norm(x))


def linears_in(block: nn.Module, members: Iterable[str]) -> list[str]:
    """The paths of the plain linears that make up ``members``: themselves, or their factors."""
    found = []
    for member in members:
        module = block.get_submodule(member)
        if not isinstance(module, FactorizedLinear):
            found.append(_inner(block, member))
            continue
        if "right" in module._modules:  # else it belongs to another member of the site
            found.append(_inner(block, f"{member}.right"))
        found.append(_inner(block, f"{member}.left"))
    return found


def shared_inputs(block: nn.Module, tower: Tower, members: Iterable[str]) -> list[list[str]]:
    """The paths of ``linears_in``, grouped by the input that they are given."""
    members, groups = list(members), []
    latents: dict[int, list[str]] = {}
    for inputs in tower.inputs:
        here = [member for member in inputs if member in members]
        groups.append(list(dict.fromkeys(input_side(block, member) for member in here)))
        for member in here:
            module = block.get_submodule(member)
            if isinstance(module, FactorizedLinear):
                latents.setdefault(id(module.right), []).append(_inner(block, f"{member}.left"))
    return [group for group in [*groups, *latents.values()] if group]


def input_side(block: nn.Module, member: str) -> str:
    """The path of the linear that reads a member's input: itself, or its right factor wherever that is listed."""
    module = block.get_submodule(member)
    if not isinstance(module, FactorizedLinear):
        return _inner(block, member)
    for name, other in block.named_modules():
        if isinstance(other, FactorizedLinear) and other.right is module.right and "right" in other._modules:
            return _inner(block, f"{name}.right")
    raise AssertionError(f"the right factor of {member} is listed nowhere")


def output_side(block: nn.Module, member: str) -> str:
    """The path of the linear that gives a member's output: itself, or its left factor."""
    factorized = isinstance(block.get_submodule(member), FactorizedLinear)
    return _inner(block, f"{member}.left" if factorized else member)


def _inner(block: nn.Module, path: str) -> str:
    while isinstance(block.get_submodule(path), (SharedLatent, PreparedLinear)):
        path += ".linear"
    return path


def set_steps(block: nn.Module, group: list[str], steps: Iterable[nn.Module]) -> None:
    """Put ``steps`` right in front of all linears of a group of ``shared_inputs``, after what is there already."""
    parent = block.get_submodule(group[0].rpartition(".")[0])
    if isinstance(parent, PreparedLinear):
        parent.steps.extend(steps)
        return
    prepare: nn.Module = nn.Sequential(*steps)
    if len(group) > 1:
        prepare = SharedLatent(prepare, len(group))
    for number, path in enumerate(group):
        block.set_submodule(path, PreparedLinear(prepare, block.get_submodule(path), leads=number == 0))


def steps_of(block: nn.Module, path: str) -> nn.Sequential:
    """What stands in front of the linear at ``path``; nothing: an empty Sequential."""
    parent = block.get_submodule(path.rpartition(".")[0])
    return parent.steps if isinstance(parent, PreparedLinear) else nn.Sequential()


def prepared_in(block: nn.Module) -> list[tuple[list[str], nn.Sequential]]:
    """All steps in ``block``, each list with the group of linears that ``set_steps`` put it in front of."""
    found: dict[int, tuple[list[str], nn.Sequential]] = {}
    for path, module in block.named_modules():
        if isinstance(module, PreparedLinear):
            group = found.setdefault(id(module.prepare), ([], module.steps))[0]
            group.insert(0 if module.leads else len(group), path)
    return list(found.values())


def change_weight(block: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the weight (out, in) of a plain linear by what ``change`` makes of it in float64, in its shape."""
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


@torch.no_grad()
def make_plain(block: nn.Module, members: Iterable[str], dtype: torch.dtype) -> None:
    """Put plain linears in the place of remapped factors: these are quantized anew, from the values they have."""
    for path in linears_in(block, members):
        mixed = block.get_submodule(path)
        if isinstance(mixed, MixedLinear):
            block.set_submodule(path, plain_linear(mixed.weight.to(dtype), mixed.bias))
