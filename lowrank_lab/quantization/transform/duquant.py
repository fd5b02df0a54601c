"""DuQuant (Lin et al. 2024): outliers are spread by a scale, two rotations in blocks and a permutation.

With rows x of activations and W (out, in), x' = x Λ⁻¹ R₁ P R₂ and W' = W Λ R₁ P R₂ have the same product, since all
but Λ are orthogonal. The blocks of R₁ and R₂ come from a greedy search on activations: each step spreads the
channel with the largest value evenly over its block, and the best product of steps is kept. P gives each block its
channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.process import progress
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import largest, smoothing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.modules import factorized, linears, steps
    from lowrank_lab.quantization import inputs, targets
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    factorized = LazyModule("lowrank_lab.modules.factorized")
    linears = LazyModule("lowrank_lab.modules.linears")
    steps = LazyModule("lowrank_lab.modules.steps")
    inputs = LazyModule("lowrank_lab.quantization.inputs")
    targets = LazyModule("lowrank_lab.quantization.targets")

# The scale takes the maximum of a channel for at least this share of the largest: a channel that is nearly zero on
# the calibration text may not be on other texts, where the scale would amplify it and the rotations spread it.
FLOOR = 1e-3
SAMPLE = 256  # evenly spaced tokens for the search; the tokens with the largest values give the same output errors


class DuQuant(Transform):
    """Lin et al. 2024, for the inputs of all linears that are quantized.

    alpha       how much of the activations' outliers the weights take over
    block_size  of the two block-diagonal rotations
    steps       of the greedy search for each of their blocks

    The scale is part of the first rotation's blocks, which costs nothing. Between the factors of a site there is no
    work in the forward: the right factor takes it over. Where the quantization has a ``latent``, the latent values
    are left to that.
    """

    label = "DuQuant"
    mixes_channels = True
    needs_seed = True
    needs_calibration = True
    online = True

    def __init__(self, alpha: float, block_size: int, steps: int) -> None:
        checks.share(alpha=alpha)
        checks.whole(1, block_size=block_size)
        checks.whole(0, steps=steps)
        self.alpha, self.block_size, self.steps = alpha, block_size, steps

    def __call__(self, context: Context, quantization: Quantization) -> None:
        """Raises FloatingPointError, naming the linear, where an activation is not finite."""
        members, seed = targets.members_by_block(context), context.cell.cfg.seed
        blocks = context.walk(context.model)
        for index, block, run in progress.track(blocks, "DuQuant", "block", len(members)):
            quantized = linears.linears_in(block, members[index])
            groups = linears.shared_inputs(block, context.tower, context.tower.linears)
            groups = [group for group in groups if set(group) & set(quantized)]
            if quantization.latent is not None:
                groups = [group for group in groups if not _reads_latent(group)]
            tokens = context.calibration_positions
            seen = inputs.sample_inputs(block, [group[0] for group in groups], run, tokens, SAMPLE)
            for group in groups:
                with named(f"block {index}: {group[0]}"):
                    spreading = self._spreading(block, group, *seen.pop(group[0]), seed)
                _install(block, group, quantized, spreading)

    def _spreading(self, block: nn.Module, group: list[str], rows: Tensor, abs_max: Tensor, seed: int) -> Spreading:
        """For the input of ``group``: from a sample of it (n, width) and each channel's largest |x| (width,)."""
        weights = largest([factorized.dense_weight(block.get_submodule(path)) for path in group])
        return spread_outliers(rows, abs_max, weights, self.alpha, self.block_size, self.steps, seed)


def _reads_latent(group: list[str]) -> bool:
    return group[0].endswith(".left")


def _install(block: nn.Module, group: list[str], quantized: list[str], spreading: Spreading) -> None:
    """Put ``spreading`` between the linears of ``group`` and their input: into the right factor, or online."""
    for path in group:
        linears.change_weight(block, path, spreading.weight)
    if _reads_latent(group):
        right = linears.input_side(block, group[0].removesuffix(".left"))
        linears.change_weight(block, right, lambda weight: spreading.activations(weight.T).T)
        linears.change_bias(block, right, lambda bias: spreading.activations(bias.unsqueeze(0))[0])
        return
    # Linears of the group that stay unrounded get separate steps, because a rounding will follow the others'.
    for part in ([p for p in group if p in quantized], [p for p in group if p not in quantized]):
        if part:
            like = next(block.get_submodule(part[0]).parameters())
            linears.set_steps(block, part, [step.to(like) for step in _steps(spreading)])


def _steps(spreading: Spreading) -> list[nn.Module]:
    width, size = len(spreading.order), spreading.first.shape[1]
    first, order, second = steps.Rotate(width, size), steps.Permute(width), steps.Rotate(width, size)
    first.blocks.data, second.blocks.data = spreading.scaled_first(), spreading.second
    order.order.data = spreading.order.int()
    return [first, order, second]


@dataclass(frozen=True)
class Spreading:
    """Λ, R₁, P and R₂ for inputs of one width, float64.

    scale   (width,), what activations are divided by
    first   (⌈width / size⌉, size, size), the blocks of R₁; of a short last one only the beginning is used, the
            rest is that of the identity
    order   (width,) int64: channel i of x P is channel ``order[i]`` of x
    second  the blocks of R₂, like ``first``
    """

    scale: Tensor
    first: Tensor
    order: Tensor
    second: Tensor

    def activations(self, x: Tensor) -> Tensor:
        """x Λ⁻¹ R₁ P R₂ of rows ``x`` (n, width)."""
        return self._rotated(x / self.scale)

    def weight(self, weight: Tensor) -> Tensor:
        """W Λ R₁ P R₂ of a ``weight`` (out, width)."""
        return self._rotated(weight * self.scale)

    def scaled_first(self) -> Tensor:
        """The blocks of Λ⁻¹ R₁, like ``first``."""
        count, size, _ = self.first.shape
        scale = torch.nn.functional.pad(self.scale, (0, count * size - len(self.scale)), value=1.0)
        return self.first / scale.view(count, size, 1)

    def _rotated(self, x: Tensor) -> Tensor:
        return rotate(rotate(x, self.first)[:, self.order], self.second)


def spread_outliers(
    rows: Tensor, abs_max: Tensor, weight_abs_max: Tensor, alpha: float, size: int, steps: int, seed: int
) -> Spreading:
    """What spreads the outliers of ``rows`` (n, width), a sample of tokens.

    abs_max, weight_abs_max  (width,), the largest |x| of each channel over all activations, and |w| of all weights
    alpha                    how much of the activations' outliers the weights take over
    size                     of the rotations' blocks; the last is short where the width is not a multiple
    steps                    of the greedy search for each block

    Raises FloatingPointError where an activation is not finite.
    """
    if not (torch.isfinite(rows).all() and torch.isfinite(abs_max).all()):
        raise FloatingPointError("an activation is not finite during calibration")
    size = min(size, rows.shape[1])
    at_least = abs_max.clamp(min=FLOOR * float(abs_max.max()))
    scale = smoothing(at_least, weight_abs_max.clamp(min=FLOOR * float(weight_abs_max.max())), alpha)
    smoothed = rows.double() / scale
    first = spreading_blocks(smoothed, size, steps, seed)
    rotated = rotate(smoothed, first)
    order = zigzag(rotated.abs().amax(0), size)
    second = spreading_blocks(rotated[:, order], size, steps, seed)
    return Spreading(scale, first, order, second)


def zigzag(magnitude: Tensor, size: int) -> Tensor:
    """The order of channels of these magnitudes (width,) in which all blocks of ``size`` have similar ones.

    The largest go one to each block, the next largest one to each in the opposite direction, and so on (DuQuant's
    zigzag permutation, appendix); a short last block takes part until it is full. int64 (width,), on the CPU.
    """
    ranked = magnitude.argsort(descending=True, stable=True).tolist()
    blocks: list[list[int]] = [[] for _ in range(math.ceil(len(ranked) / size))]
    room = [size] * (len(blocks) - 1) + [len(ranked) - size * (len(blocks) - 1)]
    forwards = True
    while ranked:
        open_blocks = [index for index, block in enumerate(blocks) if len(block) < room[index]]
        for index in open_blocks if forwards else open_blocks[::-1]:
            if ranked:
                blocks[index].append(ranked.pop(0))
        forwards = not forwards
    return torch.tensor([channel for block in blocks for channel in block])


def spreading_blocks(rows: Tensor, size: int, steps: int, seed: int) -> Tensor:
    """The blocks of a rotation that spreads the outliers of ``rows`` (n, width): (⌈width / size⌉, size, size)."""
    width, device = rows.shape[1], rows.device
    count = math.ceil(width / size)
    blocks = torch.eye(size, dtype=torch.float64, device=device).repeat(count, 1, 1)
    whole = width // size
    if whole:
        blocked = rows[:, : whole * size].unflatten(1, (whole, size)).transpose(0, 1)
        blocks[:whole] = greedy_rotations(blocked, steps, seed)
    if short := width - whole * size:
        blocks[-1, :short, :short] = greedy_rotations(rows[None, :, whole * size :], steps, seed)[0]
    return blocks


def greedy_rotations(rows: Tensor, steps: int, seed: int) -> Tensor:
    """For each of ``rows`` (count, n, size) an orthogonal R (size, size), float64, that makes max|x R| small.

    DuQuant's eq. 3 and 4: at each step the channel with the largest |x| changes places with the first, and all are
    multiplied by an orthogonal matrix whose first row is even, so that this channel is spread evenly, and whose
    other rows are random. The product of steps with the smallest maximum is kept; of none, where that is best.
    """
    count, tokens, size = rows.shape
    identity = torch.eye(size, device=rows.device).expand(count, size, size)
    state = torch.cat([rows.float(), identity], dim=1)  # below the rows, what they have been multiplied with
    magnitude = rows.float().abs().amax(1)
    best, lowest = identity, magnitude.amax(1)
    for step in _even_rotations(size, steps, seed).to(rows.device):
        loudest = magnitude.argmax(1, keepdim=True)
        swap = torch.arange(size, device=rows.device).repeat(count, 1).scatter_(1, loudest, 0)
        swap[:, :1] = loudest
        state = state.gather(2, swap.unsqueeze(1).expand_as(state)) @ step
        magnitude = state[:, :tokens].abs().amax(1)
        maximum = magnitude.amax(1)
        best = torch.where((maximum < lowest).view(-1, 1, 1), state[:, tokens:], best)
        lowest = torch.minimum(maximum, lowest)
    orthogonal, upper = torch.linalg.qr(best.double())  # many products in float32 are not quite orthogonal
    return orthogonal * upper.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


@lru_cache(maxsize=4)
def _even_rotations(size: int, steps: int, seed: int) -> Tensor:
    """One ``even_rotation`` a step, float32: all blocks and layers draw the same, which is what takes the time."""
    generator = torch.Generator().manual_seed(seed)
    found = [even_rotation(size, generator).float() for _ in range(steps)]
    return torch.stack(found) if found else torch.empty(0, size, size)


def even_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size), float64, whose first row is 1/√size everywhere."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    normal = torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64)
    others, upper = torch.linalg.qr(normal)
    matrix = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), others * upper.diagonal().sign())
    across = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)  # of the mirror from (1, 0, …) to even
    across[0] += 1
    return matrix - 2 * torch.outer(matrix @ across, across) / across.square().sum()


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """x R of rows ``x`` (n, width), with R of these diagonal ``blocks`` (count, size, size)."""
    count, size, _ = blocks.shape
    whole = torch.nn.functional.pad(x, (0, count * size - x.shape[1]))
    return torch.einsum("nbi,bij->nbj", whole.unflatten(1, (count, size)), blocks.to(x)).flatten(1)[:, : x.shape[1]]
