"""DuQuant (Lin et al. 2024): outliers are spread by a scale, two rotations in blocks and a permutation.

With rows x of activations and W (out, in), x' = x Λ⁻¹ R₁ P R₂ and W' = W Λ R₁ P R₂ have the same product, since all
but Λ are orthogonal. The blocks of R₁ and R₂ are made for the activations: as often as allowed, the channel with
the largest value is spread evenly over its block, and what was best is kept. P deals channels out to blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowrank_lab.quantization.scales import smoothing

# The smallest maximum of a channel, as a share of the largest, that the scale heeds: a channel that calibration
# hardly saw may be alive on other texts, and would be blown up there, which the rotations would spread.
FLOOR = 1e-3


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
    heeded = abs_max.clamp(min=FLOOR * float(abs_max.max()))
    scale = smoothing(heeded, weight_abs_max.clamp(min=FLOOR * float(weight_abs_max.max())), alpha)
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
        largest = magnitude.argmax(1, keepdim=True)
        swap = torch.arange(size, device=rows.device).repeat(count, 1).scatter_(1, largest, 0)
        swap[:, :1] = largest
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
