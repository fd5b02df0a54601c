"""One pass over the calibration tokens, block by block, that computes all input statistics.

The mean of x xᵀ, the mean of |x| and the maximum of |x| come from one pass, for every metric: the last two cost
almost nothing compared to the forward, and no other metric needs a second pass. Linears that share an input (q, k
and v; gate and up) share one statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_lab.calibration.summaries import InputStatistics
from lowrank_lab.models.families import Tower
from lowrank_lab.models.rows import current_rows, without_padding
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import block_file, blocks_of, walk
from lowrank_lab.modules.base import dense_weight
from lowrank_lab.process import progress

STRIPS = 4  # of the upper triangle: 4 need 5/8 of the whole product, more save little


class Accumulator:
    """Running sums of one input, products in float32 and sums over batches in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.abs_max = torch.zeros(width, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs (..., width); padding does not count."""
        x = without_padding(inputs.detach(), current_rows()).float()
        self.tokens += x.shape[0]
        # x xᵀ is symmetric: strips of its upper triangle are all that is computed.
        width = math.ceil(x.shape[1] / STRIPS)
        for first in range(0, x.shape[1], width):
            self.outer[first : first + width, first:] += x[:, first : first + width].T @ x[:, first:]
        magnitude = x.abs()
        self.abs_sum += magnitude.sum(0)
        self.abs_max = torch.maximum(self.abs_max, magnitude.amax(0))

    def second_moment(self) -> Tensor:
        """The mean of x xᵀ (width, width), float64."""
        return _mirrored(self.outer / self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Means and maximum, float32 on the CPU, for the artifact."""
        return {
            "second_moment": _mirrored((self.outer / self.tokens).float()).cpu(),
            "abs_mean": (self.abs_sum / self.tokens).float().cpu(),
            "abs_max": self.abs_max.cpu(),
        }


def _mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix with the upper triangle of ``matrix``."""
    return matrix.triu() + matrix.triu(1).T


def make_statistics(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    batches: Iterable[Batch | Tensor],
    device: torch.device,
    offload: Path | None = None,
    task: Task = CAUSAL_LM,
) -> None:
    """Compute the statistics of every input of every block; each block's file is written when it is complete.

    With ``offload`` the hidden states are kept in files in that folder.

    Raises FloatingPointError, naming the linear, where an activation is not finite.
    """
    count = len(blocks_of(model, tower))
    blocks = walk(model, tower, batches, device, offload=offload, task=task)
    for index, block, run in progress.track(blocks, "calibration", "block", count):
        accumulators = gather(block, [group[0] for group in tower.inputs], run, device)
        tokens = {name: accumulator.tokens for name, accumulator in accumulators.items()}
        tensors = {}
        for name in list(accumulators):  # free the sums of one input before the mean of the next one is computed
            means = accumulators.pop(name).tensors()
            tensors.update({f"{name}.{key}": tensor for key, tensor in means.items()})
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                linear = f"{tower.blocks}.{index}.{name.rpartition('.')[0]}"
                raise FloatingPointError(f"{linear}: its input is not finite during calibration")
        save_file(tensors, folder / block_file(index), metadata=tokens_metadata(tokens))


def make_means(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    batches: Iterable[Batch | Tensor],
    device: torch.device,
    offload: Path | None = None,
    task: Task = CAUSAL_LM,
) -> None:
    """Compute the mean of every input of every block, as ``make_statistics`` does their second moments."""
    count = len(blocks_of(model, tower))
    blocks = walk(model, tower, batches, device, offload=offload, task=task)
    for index, block, run in progress.track(blocks, "calibration means", "block", count):
        sums: dict[str, list[Tensor]] = {group[0]: [] for group in tower.inputs}
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, to=to: to.append(_sum_and_count(args[0]))
            )
            for name, to in sums.items()
        ]
        run()
        for hook in hooks:
            hook.remove()
        totals = {name: torch.stack(of_batches).sum(0) for name, of_batches in sums.items()}
        means = {f"{name}.mean": (total[:-1] / total[-1]).cpu() for name, total in totals.items()}
        save_file(means, folder / block_file(index))


def _sum_and_count(inputs: Tensor) -> Tensor:
    """The sum of inputs (…, width), then their number: (width + 1,), float64."""
    x = without_padding(inputs.detach(), current_rows()).double()
    return torch.cat([x.sum(0), x.new_tensor([len(x)])])


def load_mean(folder: Path, index: int, group: tuple[str, ...], device: torch.device) -> Tensor:
    """The mean (in,) of the input that the linears of ``group`` in block ``index`` share, float64."""
    with safe_open(folder / block_file(index), framework="pt") as file:
        return file.get_tensor(f"{group[0]}.mean").to(device)


def gather(
    block: nn.Module, linears: Iterable[str], run: Callable[[], None], device: torch.device
) -> dict[str, Accumulator]:
    """By name, the sums over the inputs of some dense ``linears`` of ``block`` during ``run()``."""
    accumulators: dict[str, Accumulator] = {}
    hooks = []
    for name in linears:
        linear = block.get_submodule(name)
        accumulators[name] = accumulator = Accumulator(_input_width(linear), device)
        hooks.append(linear.register_forward_pre_hook(lambda _, args, a=accumulator: a.add(args[0])))
    run()
    for hook in hooks:
        hook.remove()
    return accumulators


def load_statistics(folder: Path, index: int, group: tuple[str, ...], device: torch.device) -> InputStatistics:
    """The statistics of the input that the linears of ``group`` in block ``index`` share, float64."""
    with safe_open(folder / block_file(index), framework="pt") as file:
        read = lambda key: file.get_tensor(f"{group[0]}.{key}").to(device, torch.float64)
        return InputStatistics(
            tokens=tokens_of(file.metadata(), group[0]),
            second_moment=read("second_moment"),
            abs_mean=read("abs_mean"),
            abs_max=read("abs_max"),
        )


def tokens_metadata(tokens: Mapping[str, int]) -> dict[str, str]:
    """The ``metadata`` of a block's file: ``tokens``, the number of input tokens of its linears.

    Where linears have different numbers, as experts do, it has ``tokens.<linear>`` for each.
    """
    if len(set(tokens.values())) == 1:
        return {"tokens": str(next(iter(tokens.values())))}
    return {f"tokens.{name}": str(count) for name, count in tokens.items()}


def tokens_of(metadata: Mapping[str, str], linear: str) -> int:
    """The number of input tokens of a linear, from the ``tokens_metadata`` of its block."""
    return int(metadata.get(f"tokens.{linear}") or metadata["tokens"])


def _input_width(linear: nn.Module) -> int:
    return dense_weight(linear).shape[1]
