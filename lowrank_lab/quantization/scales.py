"""Scales of the channels of an input, which linears that read it take over: y = (W diag(s)) (diag(s)⁻¹ x).

How large s has to be for both to be rounded well. folding.py says where diag(s)⁻¹ goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import quantize
from lowrank_lab.modules.formats import Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

LIMIT = 1e4  # scales lie between its inverse and it, so that no weight over- or underflows


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scales (Xiao et al. 2023, eq. 4): s_j = max|X_j|^α / max|W_j|^(1−α), (width,), float64.

    ``inputs`` and ``weights`` (width,) are max|X_j| and max|W_j|; a channel where one of them is zero has s = 1.
    """
    inputs, weights = inputs.double(), weights.double()
    return limited(inputs**alpha / weights ** (1 - alpha), (inputs > 0) & (weights > 0))


def largest(weights: Sequence[Tensor]) -> Tensor:
    """max|W_j| (width,) over the rows of all ``weights`` (out, width) that read one input."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def rounded(weight: Tensor, form: Format) -> Tensor:
    """``weight`` (out, in) rounded to the nearest values of ``form``, float32.

    For a codebook, which is found only later, the values of the same bits lie evenly.
    """
    if form.grid == "codebook":
        form = replace(form, grid="integer", symmetric=False)
    return quantize(weight, form).dequantize()


def output_error(error: Tensor, second_moment: Tensor) -> Tensor:
    """mean ‖E x‖² = tr(E C Eᵀ) of E (out, in), given C (in, in), the mean x xᵀ."""
    return ((error @ second_moment) * error).sum()


def limited(scales: Tensor, used: Tensor) -> Tensor:
    """``scales`` within their limits, and 1 where a channel is not ``used`` (bool)."""
    return torch.where(used, scales, 1.0).clamp(1 / LIMIT, LIMIT)
