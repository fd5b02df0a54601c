"""From numbers to the codes of a ``Format`` and back.

A matrix is cut into groups along its rows, the last of which may be short; each group has a scale, and a zero point
or a codebook where the format has one. Nothing here knows of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.formats import Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

# The 16 values of NormalFloat 4 (QLoRA, Dettmers et al. 2023, appendix E): quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Those of bitsandbytes' FP4 (a sign, two bits of exponent, one of mantissa); zero is there twice.
FP4 = tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0, 0.0625, 2, 3, 4, 6, 8, 12))
TABLES = {"nf4": NF4, "fp4": FP4}


@dataclass
class Quantized:
    """A matrix (rows, width) in a format.

    codes     (rows, width) uint8, 0 … 2^bits − 1
    scale     (rows, groups) float; (1, 1) for ``tensor``
    zero      like ``scale``, a float whose value is a whole code; None where the grid has none
    codebook  (rows, groups, 2^bits) float, for a codebook grid
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    codebook: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The matrix (rows, width) that the codes stand for, in the dtype of ``scale``."""
        if self.format.grid == "codebook":
            values = self._of_codebooks()
        elif self.format.grid in TABLES:
            table = self.scale.new_tensor(TABLES[self.format.grid])
            values = table.index_select(0, self.codes.int().view(-1)).view(self.codes.shape)
        else:
            values = self.codes.to(self.scale.dtype)
            if self.zero is None:
                values.sub_(2 ** (self.format.bits - 1))
        for groups, part in by_group(values, self.format):
            if self.zero is not None:
                part.sub_(self.zero[:, groups, None])
            part.mul_(self.scale[:, groups, None])
        return values

    def _of_codebooks(self) -> Tensor:
        """The value (rows, width) that each code has in the codebook of its group."""
        assert self.codebook is not None
        values = torch.empty(self.codes.shape, dtype=self.codebook.dtype, device=self.codes.device)
        parts = zip(by_group(self.codes.long(), self.format), by_group(values, self.format), strict=True)
        for (groups, codes), (_, part) in parts:
            part.copy_(self.codebook[:, groups].expand(*codes.shape[:2], -1).gather(2, codes))
        return values


def quantize(x: Tensor, form: Format) -> Quantized:
    """Round a matrix ``x`` (rows, width) to the nearest values of any format but a codebook.

    Raises FloatingPointError where x is not finite.
    """
    check_finite(x)
    x = x.float()
    scale, zero = grids(x, form)
    width = x.shape[1]
    codes = encode(x, form, spread(scale, form, width), None if zero is None else spread(zero, form, width))
    return Quantized(form, codes, scale, zero)


def grids(x: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of every group of ``x`` (rows, width), each (rows, groups).

    Asymmetric: scale = (max − min) / (2^b − 1) with 0 always among the values; symmetric: 2 max|x| / (2^b − 1),
    codes around 2^(b−1); NF4, FP4: max|x|. The scale of a group of zeros is 1.
    """
    low, high = _extremes(x, form)
    largest = torch.maximum(low.abs(), high.abs())
    steps = 2**form.bits - 1
    if form.grid in TABLES:
        return _kept_scale(largest, form), None
    if form.symmetric:
        return _kept_scale(2 * largest / steps, form), None
    scale = _kept_scale((high - low) / steps, form)
    return scale, (-low / scale).round().clamp(0, steps)


def encode(x: Tensor, form: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The codes (uint8) of the values nearest to ``x``; ``scale`` and ``zero`` are as large as it."""
    if form.grid in TABLES:
        table = x.new_tensor(TABLES[form.grid])
        return torch.bucketize(x / scale, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    middle = 2 ** (form.bits - 1) if zero is None else zero
    return ((x / scale).round() + middle).clamp(0, 2**form.bits - 1).to(torch.uint8)


def decode(codes: Tensor, form: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The values that codes stand for, but those of a codebook; the other way round from ``encode``."""
    if form.grid in TABLES:
        return scale.new_tensor(TABLES[form.grid])[codes.long()] * scale
    return (codes - (float(2 ** (form.bits - 1)) if zero is None else zero)) * scale


def check_finite(x: Tensor, what: str = "a weight to be quantized") -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"{what} is not finite")


def spread(values: Tensor, form: Format, width: int) -> Tensor:
    """One value a group (rows, groups) as one a column (rows, width)."""
    return values.repeat_interleave(form.group_of(width), dim=1)[:, :width]


def by_group(x: Tensor, form: Format) -> list[tuple[slice, Tensor]]:
    """Views of ``x`` (rows, width) as (rows, groups, neighbours), with which groups these are: its whole
    groups, and the short one at the end if there is one. With one scale for the tensor, a row is a group here.
    """
    width = x.shape[1]
    group = form.group_of(width)
    whole = width // group
    views = [(slice(whole), x[:, : whole * group].unflatten(1, (whole, group)))]
    if width % group:
        views.append((slice(whole, None), x[:, whole * group :].unsqueeze(1)))
    return views


def _kept_scale(scale: Tensor, form: Format) -> Tensor:
    """``scale`` as its dtype keeps it, in the dtype that it has; 1 where it is zero, also after rounding.

    That of values that are not numbers is none either, so that what they are rounded to does not look like one.
    """
    kept = scale.to(getattr(torch, form.scale_dtype)).to(scale.dtype)
    if torch.isinf(kept).any():
        raise FloatingPointError(f"a scale is too large for {form.scale_dtype}; choose scale_dtype=float32")
    return torch.where(kept == 0, torch.ones_like(kept), kept)


def _extremes(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The lowest value or 0, and the highest or 0, of every group: each (rows, groups), (1, 1) for ``tensor``."""
    if form.granularity == "tensor":
        low, high = x.amin().view(1, 1), x.amax().view(1, 1)
    else:
        width = x.shape[1]
        group = form.group_of(width)
        # The last group is filled up with its last value, which changes no extreme.
        whole = torch.nn.functional.pad(x.unsqueeze(0), (0, -width % group), mode="replicate")[0]
        grouped = whole.view(len(x), -1, group)
        low, high = grouped.amin(2), grouped.amax(2)
    return low.clamp(max=0), high.clamp(min=0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (…) uint8 below 2^bits as a stream of their bits, the lowest first: uint8 (⌈count · bits / 8⌉,)."""
    if bits == 8:
        return codes.flatten().clone()
    length = math.ceil(codes.numel() * bits / 8)
    dtype, count, moves = _words(bits)
    words = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % count)).view(dtype)
    for low, high, gap in reversed(moves):
        upper = words >> gap
        words &= low
        words |= upper.bitwise_and_(high)
    return words.view(torch.uint8).view(-1, count)[:, : count * bits // 8].reshape(-1)[:length].clone()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack`` was given, of this ``shape``; with 8 bits ``packed`` itself, to be read only."""
    if bits == 8:
        return packed.view(shape)
    dtype, count, moves = _words(bits)
    used = count * bits // 8  # bytes of a word
    if used == 1:
        words = packed.to(dtype)
    else:
        stream = torch.nn.functional.pad(packed, (0, -len(packed) % used)).view(-1, used)
        words = torch.nn.functional.pad(stream, (0, count - used)).view(dtype)
    for low, high, gap in moves:
        upper = words & high
        words &= low
        words |= upper.bitwise_left_shift_(gap)
    return words.view(torch.uint8).view(-1)[: math.prod(shape)].view(shape)


def _words(bits: int) -> tuple[torch.dtype, int, list[tuple[int, int, int]]]:
    """How codes that lie close get a byte each: as words of so many codes, whose bits move in halves.

    A word is the fewest codes that fill whole bytes, in an integer of as many bytes as it has codes. First the
    upper half of its codes moves away from the lower, then the upper half of each half, and so on. A move is the
    mask of what stays, the mask of what moves, and how far. Backwards it packs. The first byte in memory is the
    lowest of a word, as on every machine that torch has builds for.
    """
    count = 8 // math.gcd(bits, 8)
    moves = []
    for half in (count >> step for step in range(1, count.bit_length())):
        stays = sum(((1 << (half * bits)) - 1) << start for start in range(0, 8 * count, 16 * half))
        moves.append((stays, stays << (half * bits), half * (8 - bits)))
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[count], count, moves
