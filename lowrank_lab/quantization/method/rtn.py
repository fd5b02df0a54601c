"""Rounding to the nearest value of the format, without data: integers, NF4 and FP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.modules.codec import Quantized, quantize
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.quantization.inputs import Inputs


class RoundToNearest(WeightMethod):
    """RTN as in ASVD §4.4, and NF4 as in QLoRA, by the format."""

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        return quantize(weight, form)
