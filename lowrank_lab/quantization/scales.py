"""Scales of the channels of an input, which linears that read it take over: y = (W diag(s)) (diag(s)⁻¹ x).

How large s has to be for both to be rounded well. Where diag(s)⁻¹ goes is said in folding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lowrank_lab.lazy_module import LazyModule
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
    return _kept(inputs**alpha / weights ** (1 - alpha), (inputs > 0) & (weights > 0))


def largest(weights: Sequence[Tensor]) -> Tensor:
    """max|W_j| (width,) over the rows of all ``weights`` (out, width) that read one input."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def awq_candidates(abs_mean: Tensor, points: int) -> Tensor:
    """AWQ's scales (Lin et al. 2024, eq. 5) for α = 0, 1/points, … below 1: (points, width), float64.

    s_j = mean|x_j|^α, divided by √(max s · min s); 1 where ``abs_mean`` (width,) is zero. The first are all 1.
    """
    used = abs_mean > 0
    if not used.any():
        return torch.ones(points, len(abs_mean), dtype=torch.float64, device=abs_mean.device)
    log = torch.where(used, abs_mean.double(), 1.0).log()
    middle = (log[used].max() + log[used].min()) / 2
    alphas = torch.arange(points, dtype=torch.float64, device=abs_mean.device).unsqueeze(1) / points
    return _kept((alphas * (log - middle)).exp(), used)


def awq_losses(scales: Tensor, second_moment: Tensor, weights: Sequence[tuple[Tensor, Format]]) -> Tensor:
    """Σ mean ‖(Q(W diag(s)) diag(s)⁻¹ − W) x‖² for every s of ``scales`` (points, width): (points,), float32.

    The sum is over the ``weights`` (out, width) that read the input, Q rounds to the nearest of their formats, and
    ``second_moment`` (width, width) is the mean x xᵀ. Raises FloatingPointError where a weight is not finite.
    """
    losses = torch.zeros(len(scales), device=scales.device)
    for weight, form in weights:
        weight, moment = weight.float(), second_moment.float()
        for number, scale in enumerate(scales.float()):
            error = rounded(weight * scale, form) / scale - weight
            losses[number] += output_error(error, moment)
    return losses


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


def _kept(scales: Tensor, used: Tensor) -> Tensor:
    return torch.where(used, scales, 1.0).clamp(1 / LIMIT, LIMIT)
