"""Weights clustered: a codebook of its own for every channel or group, in place of an evenly spaced grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.inputs import Inputs


class KMeans(WeightMethod):
    """Clustering as in CodeQuant (papers/000): clustering.py.

    weighted    squared errors of a weight count by the mean x² of its input; else all alike, and without data
    iterations  of Lloyd's algorithm, at most
    """

    label = "k-means"

    def __init__(self, weighted: bool, iterations: int) -> None:
        checks.flag(weighted=weighted)
        checks.whole(0, iterations=iterations)
        self.needs_inputs = weighted
        self.iterations = iterations

    def check(self, form: Format) -> None:
        if form.grid != "codebook":
            raise ValueError(
                f"weights.grid={form.grid} is not what quantization/method=kmeans makes; choose codebook"
            )

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        from lowrank_lab.quantization.clustering import kmeans

        energy = inputs.second_moment.diagonal() if self.needs_inputs and inputs is not None else None
        return kmeans(weight, energy, form, self.iterations)
