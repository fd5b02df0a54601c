"""SmoothQuant: a scale makes activations easier to round, and weights harder by as much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.lazy_module import LazyModule
from lowrank_lab.models.families import Tower, folding_of
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import largest, smoothing

if TYPE_CHECKING:
    from lowrank_lab.quantization import folding
    from lowrank_lab.running.context import Context
else:
    folding = LazyModule("lowrank_lab.quantization.folding")


class SmoothQuant(Transform):
    """Xiao et al. 2023: linears read x / s and have W diag(s), with s_j = max|X_j|^α / max|W_j|^(1−α).

    alpha  how much of the difficulty moves into the weights, from 0 to 1
    where  ``norms``: inputs that a norm gives; ``foldable``: also those whose scale the rows of another linear
           take over; ``all``: the others too, divided by s in the forward

    max|W_j| is over all linears that read the input; query heads that share values share a scale, that of the
    largest of them. A factored site is scaled at its right factor.
    """

    label = "SmoothQuant"
    needs_calibration = True

    def __init__(self, alpha: float, where: str) -> None:
        checks.share(alpha=alpha)
        checks.one_of(("norms", "foldable", "all"), where=where)
        self.alpha, self.where = alpha, where
        self.online = where == "all"

    def check(self, tower: Tower, quantization: Quantization) -> None:
        folding_of(tower, self.label)

    def __call__(self, context: Context, quantization: Quantization) -> None:
        for block, inputs in folding.calibrated(context, folding.SOURCES[self.where]):
            scales = []
            for at, sums in inputs:
                weights = largest(folding.weights_of(block, at.readers))
                activations, weights = (at.shared(each, lambda x: x.amax(1)) for each in (sums.abs_max, weights))
                scales.append((at, smoothing(activations, weights, self.alpha)))
            folding.fold(block, context.tower, scales)
