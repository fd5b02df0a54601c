"""AWQ: channels with large inputs are made larger in the weights before these are rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.errors import SkippedCell
from lowrank_lab.models.families import Tower, folding_of
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Awq(Transform):
    """Lin et al. 2024: linears read x / s and have W diag(s), with s_j = mean|x_j|^α.

    points  how many α = 0, 1/points, … are tried for every input; α = 0 is no scale
    where   ``norms``: inputs that a norm gives; ``foldable``: also those whose scale the rows of another linear
            take over; ``all``: the others too, divided by s in the forward

    Taken is the α with the smallest Σ mean ‖Q(W diag(s)) x / s − W x‖², over the linears that read the input, each
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
        from lowrank_lab.quantization.apply import format_of
        from lowrank_lab.quantization.folding import SOURCES, calibrated, fold, weights_of
        from lowrank_lab.quantization.scales import awq_candidates, awq_losses

        for block, inputs in calibrated(context, (*SOURCES[self.where], "latent")):
            scales = []
            for at, sums in inputs:
                abs_mean = at.shared(sums.abs_sum / sums.tokens, lambda x: x.mean(1))
                candidates = awq_candidates(abs_mean, self.points)
                forms = [format_of(path, quantization) for path in at.rounded]
                weights = list(zip(weights_of(block, at.rounded), forms, strict=True))
                best = awq_losses(candidates, sums.second_moment(), weights).argmin()
                scales.append((at, candidates[best]))
            fold(block, context.tower, scales)
