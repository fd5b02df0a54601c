"""SmoothQuant on the latent values of a site, between its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import largest, smoothing

if TYPE_CHECKING:
    from lowrank_lab.quantization import folding
    from lowrank_lab.running.context import Context
else:
    folding = LazyModule("lowrank_lab.quantization.folding")


class LatentSmooth(Transform):
    """left ← left diag(s) and right ← diag(s)⁻¹ right, with s_j = max|z_j|^α / max|left_j|^(1−α).

    alpha  how much of the latent's range moves into the left factors, from 0 to 1

    z is the latent on the calibration text, left_j a column of all left factors that read it. Dense sites stay as
    they are.
    """

    label = "latent SmoothQuant"
    needs_calibration = True

    def __init__(self, alpha: float) -> None:
        checks.share(alpha=alpha)
        self.alpha = alpha

    def __call__(self, context: Context, quantization: Quantization) -> None:
        if not folding.any_factored(context.model, context.tower):
            return
        for block, inputs in folding.calibrated(context, ["latent"]):
            scales = []
            for at, sums, _ in inputs:
                weights = largest(folding.weights_of(block, at.readers))
                scales.append((at, smoothing(sums.abs_max, weights, self.alpha)))
            folding.fold(block, context.tower, scales)
