"""Rounding to the nearest value of the format, without data: integers and NF4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.quantization.base import WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.quantization.codec import Quantized


class RoundToNearest(WeightQuantizer):
    """RTN as in ASVD §4.4, and NF4 as in QLoRA, by the format."""

    def quantize(self, weight: Tensor, second_moment: Tensor | None) -> Quantized:
        from lowrank_lab.quantization.codec import quantize

        return quantize(weight, self.weights)
