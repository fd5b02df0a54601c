"""The inputs of linears on the calibration text, collected in one pass over a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_lab.calibration.statistics import gather
from lowrank_lab.models.rows import current_rows, without_padding
from lowrank_lab.modules.codec import check_finite
from lowrank_lab.modules.linears import steps_of
from lowrank_lab.modules.steps import Round

ROWS = 1024  # tokens in the sample for a method


@dataclass
class Inputs:
    """The inputs of one linear, after the steps before it.

    second_moment  mean x xᵀ (in, in), float64
    rows           a sample of tokens (up to ROWS, in), float32, before they are rounded; None: not needed
    rounding       the step that rounds them; None: they are not rounded. A method may change a fixed scale
    exact_rows     the same tokens in the model before any block of it was rounded; None: not needed
    """

    second_moment: Tensor
    rows: Tensor | None
    rounding: Round | None
    exact_rows: Tensor | None = None


class Sample:
    """Up to ``count`` of a text's so many ``tokens``, evenly taken, whatever batches they come in."""

    def __init__(self, tokens: int, count: int) -> None:
        self.wanted = torch.linspace(0, tokens - 1, min(count, tokens), dtype=torch.float64).long()
        self.seen = 0
        self.found: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """The next batch of the text: (…, width); padding does not count."""
        x = without_padding(x.detach(), current_rows())
        here = self.wanted[(self.wanted >= self.seen) & (self.wanted < self.seen + len(x))] - self.seen
        self.found.append(x[here.to(x.device)].float())
        self.seen += len(x)

    @property
    def rows(self) -> Tensor:
        """(count, width), float32; empty where nothing was added."""
        return torch.cat(self.found) if self.found else torch.empty(0)


def gather_inputs(
    block: nn.Module, paths: list[str], run: Callable[[], None], tokens: int, rows: bool, device: torch.device
) -> dict[str, Inputs]:
    """The inputs of the linears at ``paths`` while ``run()`` passes so many ``tokens`` through the block."""
    rounding = {path: rounding_of(block, path) for path in paths}
    tapped = {path: rounding[path] or block.get_submodule(path) for path in paths}
    samples = {id(module): Sample(tokens, ROWS) for module in tapped.values()} if rows else {}
    modules = {id(module): module for module in tapped.values()} if rows else {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: samples[id(module)].add(args[0]))
        for module in modules.values()
    ]
    sums = gather(block, paths, run, device)
    for hook in hooks:
        hook.remove()
    sampled = {key: sample.rows for key, sample in samples.items()}
    return {
        path: Inputs(sums[path].second_moment(), sampled.get(id(tapped[path])), rounding[path]) for path in paths
    }


def sample_inputs(
    block: nn.Module, paths: list[str], run: Callable[[], None], tokens: int, count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs of the linears at ``paths`` while ``run()`` passes ``tokens`` tokens through the block.

    By path: an even sample of up to ``count`` tokens (n, in), float32, and the largest |x| of each channel (in,).
    """
    samples = {path: Sample(tokens, count) for path in paths}
    abs_max: dict[str, Tensor] = {}

    def look(path: str, args: tuple[Tensor, ...]) -> None:
        samples[path].add(args[0])
        largest = without_padding(args[0].detach(), current_rows()).abs().amax(0).float()
        abs_max[path] = torch.maximum(abs_max.get(path, largest), largest)

    hooks = [
        block.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: look(path, args))
        for path in paths
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {path: (samples[path].rows, abs_max[path]) for path in paths}


def fix_scales(block: nn.Module, paths: list[str], run: Callable[[], None]) -> None:
    """Choose the fixed scales of the rounding in front of ``paths`` for all that ``run()`` passes through.

    Nothing is rounded on the way: what has no scale yet would spoil what comes after it. Raises FloatingPointError,
    naming the linear, where an input is not finite.
    """
    steps = {id(step): step for path in paths if (step := rounding_of(block, path)) is not None}
    lowest: dict[int, Tensor] = {}
    highest: dict[int, Tensor] = {}

    def note(step: nn.Module, args: tuple[Tensor, ...], _rounded: Tensor) -> Tensor:
        x, key = without_padding(args[0].detach(), current_rows()), id(step)
        low, high = x.amin().float(), x.amax().float()
        lowest[key] = torch.minimum(lowest.get(key, low), low)
        highest[key] = torch.maximum(highest.get(key, high), high)
        return args[0]

    hooks = [step.register_forward_hook(note) for step in steps.values()]
    run()
    for hook in hooks:
        hook.remove()
    for path in paths:
        if (step := rounding_of(block, path)) is not None:
            check_finite(highest[id(step)] - lowest[id(step)], f"{path}: an input")
            step.fix(lowest[id(step)], highest[id(step)])


def rounding_of(block: nn.Module, path: str) -> Round | None:
    """The rounding in front of the linear at ``path``: the last of its steps, if it is one."""
    steps = steps_of(block, path)
    last = steps[-1] if len(steps) else None
    return last if isinstance(last, Round) else None
