"""AWQ: weights are scaled up where their inputs are large, before they are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.models.families import Tower, folding_of
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import limited, output_error, rounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.quantization import folding
    from lowrank_lab.running.context import Context
else:
    torch, folding = LazyModule("torch"), LazyModule("lowrank_lab.quantization.folding")


class Awq(Transform):
    """Lin et al. 2024: linears read x / s and have W diag(s), with s_j = mean|x_j|^α.

    points  how many α = 0, 1/points, … are tried for every input; α = 0 is no scale
    where   ``norms``: inputs that a norm gives; ``foldable``: also those whose scale the rows of another linear
            take over; ``all``: the others too, divided by s in the forward

    The best α has the smallest Σ mean ‖Q(W diag(s)) x / s − W x‖², over the linears that read the input, each
    rounded to the nearest of its format. Query heads that share values share a scale, that of their mean. A
    factored site is scaled at its right factor, and its latent at the left one. AWQ's search for clipped ranges
    is no part of this: it changes what the model computes.
    """

    label = "AWQ"
    needs_calibration = True

    def __init__(self, points: int, where: str) -> None:
        checks.whole(1, points=points)
        checks.one_of(("norms", "foldable", "all"), where=where)
        self.points, self.where = points, where
        self.online = where == "all"

    def check(self, tower: Tower, quantization: Quantization) -> None:
        folding_of(tower, self.label)
        if quantization.method is None:
            raise SkippedCell("AWQ scales weights that are rounded; choose a quantization/method")

    def __call__(self, context: Context, quantization: Quantization) -> None:
        sources = (*folding.SOURCES[self.where], "latent")
        for index, (block, inputs) in enumerate(folding.calibrated(context, sources)):
            scales = []
            for at, sums, _ in inputs:
                abs_mean = at.shared(sums.abs_sum / sums.tokens, lambda x: x.mean(1))
                candidates = awq_candidates(abs_mean, self.points)
                forms = [quantization.format_of(path) for path in at.rounded]
                weights = list(zip(folding.weights_of(block, at.rounded), forms, strict=True))
                with named(f"block {index}: {at.rounded[0]}"):
                    best = awq_losses(candidates, sums.second_moment(), weights).argmin()
                scales.append((at, candidates[best]))
            folding.fold(block, context.tower, scales)


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
    return limited((alphas * (log - middle)).exp(), used)


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
