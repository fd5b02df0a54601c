"""A linear layer whose weight is kept in few bits, packed, in memory as on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.base import CompressedLinear, Counts, bias_of, dense_weight, nbytes
from lowrank_lab.modules.codec import Quantized, pack, unpack
from lowrank_lab.modules.formats import Format


class QuantizedLinear(CompressedLinear):
    """y = x Wᵀ + b with W (out, in) in a ``Format``; it multiplies with the values that the codes stand for.

    codes     uint8, the stream of all codes, ⌈out · in · bits / 8⌉ bytes
    scale     (out, groups) or (1, 1)
    zero      uint8, the stream of the zero points' codes; None where the format has none
    codebook  (out, groups, 2^bits) of a codebook grid
    """

    kind = "quantized"
    quantized = True

    def __init__(
        self, form: Format, shape: tuple[int, int], tensors: dict[str, Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.format = form
        self.out_features, self.in_features = shape
        for name in ("codes", "scale", "zero", "codebook"):
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def of(cls, quantized: Quantized, bias: Tensor | None) -> QuantizedLinear:
        form = quantized.format
        dtype = getattr(torch, form.scale_dtype)
        tensors = {"codes": pack(quantized.codes, form.bits), "scale": quantized.scale.to(dtype)}
        if quantized.zero is not None:
            tensors["zero"] = pack(quantized.zero.to(torch.uint8), form.bits)
        if form.grid == "codebook":
            assert quantized.codebook is not None
            tensors["codebook"] = quantized.codebook.to(dtype)
        return cls(form, (quantized.codes.shape[0], quantized.codes.shape[1]), tensors, bias)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> QuantizedLinear:
        form = Format(**description["format"])
        out, inp = dense_weight(replaced).shape
        shape = (out, inp)
        scales, dtype = form.scales(shape), getattr(torch, form.scale_dtype)
        tensors = {
            "codes": torch.empty(form.packed(shape), dtype=torch.uint8, device="meta"),
            "scale": torch.empty(scales, dtype=dtype, device="meta"),
        }
        if form.has_zero:
            tensors["zero"] = torch.empty(form.packed(scales), dtype=torch.uint8, device="meta")
        if form.grid == "codebook":
            tensors["codebook"] = torch.empty((*scales, 2**form.bits), dtype=dtype, device="meta")
        return cls(form, shape, tensors, bias_of(replaced))

    def describe(self) -> dict[str, Any]:
        return {"format": asdict(self.format)}

    def counts(self) -> Counts:
        weights, codes = self.out_features * self.in_features, self.get_parameter("codes")
        tensors = [tensor for name, tensor in self.named_parameters() if name != "bias"]
        return Counts(weights, nbytes(*tensors), weights, (codes,))

    def dense_weight(self) -> Tensor:
        return self.weight

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the layer multiplies with, float32."""
        return self.unpacked().dequantize()

    def unpacked(self) -> Quantized:
        """Its codes, a byte each, with scales, zero points and codebooks in float32."""
        parts: dict[str, Any] = dict(self.named_parameters())
        form, scale = self.format, parts["scale"].float()
        codes = unpack(parts["codes"], form.bits, (self.out_features, self.in_features))
        zero = unpack(parts["zero"], form.bits, tuple(scale.shape)).float() if "zero" in parts else None
        codebook = parts["codebook"].float() if "codebook" in parts else None
        return Quantized(form, codes, scale, zero, codebook)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
