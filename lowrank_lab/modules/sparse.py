"""A linear layer with pruned weights: it stores the others, and one bit for every weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.base import CompressedLinear, Counts, bias_of, dense_weight, is_linear, nbytes
from lowrank_lab.modules.codec import pack, unpack
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.factorized import plain_linear, to_plain


class SparseLinear(CompressedLinear):
    """y = x Wᵀ + b with W (out, in), of which only the weights that are not pruned are stored.

    mask    uint8 (⌈out · in / 8⌉,): a bit for each weight, row by row, 1 where it is kept
    values  (kept,): these weights, row by row, in the dtype of the model

    The product is a dense one: this saves memory, not time.
    """

    kind = "sparse"

    def __init__(self, shape: tuple[int, int], mask: Tensor, values: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.values = nn.Parameter(values, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, bias: Tensor | None) -> SparseLinear:
        """``weight`` (out, in) where ``kept`` (out, in), bool, is true, and zero elsewhere."""
        out, inp = weight.shape
        return cls((out, inp), pack(kept.to(torch.uint8), 1), weight[kept], bias)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> SparseLinear:
        like = dense_weight(replaced)
        out, inp = like.shape
        return cls((out, inp), _empty_mask(like), like.new_empty(description["kept"]), bias_of(replaced))

    def describe(self) -> dict[str, Any]:
        return {"kept": len(self.values)}

    def counts(self) -> Counts:
        products = self.out_features * self.in_features
        stored = (self.mask, self.values)
        return Counts(len(self.values), nbytes(*stored), products, stored)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the layer multiplies with, in the dtype of ``values``."""
        kept = unpack(self.mask, 1, (self.out_features, self.in_features)).bool()
        return self.values.new_zeros(kept.shape).masked_scatter(kept, self.values)

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        return MaskedLinear(plain_linear(self.weight.to(dtype), self.bias), self.mask, len(self.values))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class MaskedLinear(CompressedLinear):
    """``linear`` with its pruned weights set to zero, also after a quantization of ``linear``.

    mask  as in SparseLinear
    kept  how many weights are not pruned
    """

    kind = "masked"
    input_part = output_part = "linear"

    def __init__(self, linear: nn.Module, mask: Tensor, kept: int) -> None:
        super().__init__()
        self.linear = linear
        self.mask = nn.Parameter(mask.detach(), requires_grad=False)
        self.kept = kept

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> MaskedLinear:
        return cls(replaced, _empty_mask(dense_weight(replaced)), description["kept"])

    def describe(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def counts(self) -> Counts:
        inner = count(self.linear)
        read = () if is_linear(self.linear) else (self.mask,)
        return Counts(self.kept, inner.bytes + nbytes(self.mask), inner.macs, inner.weights + read)

    def dense_weight(self) -> Tensor:
        weight = dense_weight(self.linear).detach().float()
        return weight * unpack(self.mask, 1, (weight.shape[0], weight.shape[1]))

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        self.linear = to_plain(self.linear, dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if is_linear(self.linear):  # its pruned weights are zero until it is rounded
            return self.linear(x)
        return nn.functional.linear(x, self.dense_weight().to(x.dtype), bias_of(self.linear))


def _empty_mask(like: Tensor) -> Tensor:
    """The mask for a weight of the shape of ``like``, without values, on the meta device."""
    return torch.empty(-(-like.numel() // 8), dtype=torch.uint8, device="meta")
