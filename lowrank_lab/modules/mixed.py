"""A linear layer whose weight is kept partly in 8-bit integers and partly in float16 (Dobi-SVD, Algorithm 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.base import CompressedLinear, Counts, bias_of, dense_weight, nbytes
from lowrank_lab.modules.factorized import plain_linear
from lowrank_lab.modules.site import Site


class MixedLinear(CompressedLinear):
    """A factor of a site. ``side`` says where its rank lies, and so which way it is cut.

    side="left"   weight (out, k): the first rows in 8 bits; scale (k,) belongs to the input
    side="right"  weight (k, in): the first columns in 8 bits; scale (k,) belongs to the output

    The weight is cat(int8 · scale, float16).
    """

    kind = "mixed"

    def __init__(self, side: str, int8: Tensor, float16: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.side = side
        rank, length = len(scale), sum(part.shape[0 if side == "left" else 1] for part in (int8, float16))
        self.out_features, self.in_features = (length, rank) if side == "left" else (rank, length)
        self.int8 = nn.Parameter(int8, requires_grad=False)
        self.float16 = nn.Parameter(float16, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def of_left(cls, weight: Tensor, largest: Tensor, in_8_bit: int, bias: Tensor | None) -> MixedLinear:
        """Quantize the first ``in_8_bit`` rows of ``weight`` (out, k), whose columns reach to ``largest`` (k,)."""
        scale = _scale(largest)
        return cls("left", _round(weight[:in_8_bit] / scale), _half(weight[in_8_bit:]), _kept(scale), bias)

    @classmethod
    def of_right(cls, weight: Tensor, in_8_bit: int) -> MixedLinear:
        """Quantize the first ``in_8_bit`` columns of ``weight`` (k, in)."""
        scale = _scale(weight[:, :in_8_bit].abs().amax(1))
        int8 = _round(weight[:, :in_8_bit] / scale.unsqueeze(-1))
        return cls("right", int8, _half(weight[:, in_8_bit:]), _kept(scale), None)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> MixedLinear:
        side, in_8_bit = description["side"], description["in_8_bit"]
        out, inp = dense_weight(replaced).shape
        length, rank = (out, inp) if side == "left" else (inp, out)
        int8, float16 = (
            torch.empty((count, rank) if side == "left" else (rank, count), dtype=dtype, device="meta")
            for count, dtype in ((in_8_bit, torch.int8), (length - in_8_bit, torch.float16))
        )
        scale = torch.empty(rank, dtype=torch.float32, device="meta")
        return cls(side, int8, float16, scale, bias_of(replaced))

    def describe(self) -> dict[str, Any]:
        return {"side": self.side, "in_8_bit": self.int8.shape[0 if self.side == "left" else 1]}

    @property
    def weight(self) -> Tensor:
        """The weight that the layer multiplies with, (out, k) or (k, in), float32."""
        scale = self.scale if self.side == "left" else self.scale.unsqueeze(-1)
        return torch.cat([self.int8.float() * scale, self.float16.float()], dim=0 if self.side == "left" else 1)

    def dense_weight(self) -> Tensor:
        return self.weight

    def counts(self) -> Counts:
        weights = Counts.of_weights(self.int8, self.float16)
        return weights + Counts(bytes=nbytes(self.scale))

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        return plain_linear(self.weight.to(dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def rows_in_8_bit(site: Site, rows: slice) -> int:
    """How many of these rows of the left factor of ``site`` are in 8 bits: those among its first min(out, in)."""
    return max(0, min(site.full, rows.stop) - rows.start)


def _scale(largest: Tensor) -> Tensor:
    """The size of one step where the largest value is step 127; 1 where all values are zero."""
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


def _kept(scale: Tensor) -> Tensor:
    kept = scale.float()
    if not torch.isfinite(kept).all():
        raise FloatingPointError("a factor is too large for float32; use another storage")
    return kept


def _round(steps: Tensor) -> Tensor:
    return steps.round().clamp(-127, 127).to(torch.int8).contiguous()


def _half(values: Tensor) -> Tensor:
    half = values.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise FloatingPointError("a factor is too large for float16; use another storage")
    return half
