"""GPTQ: weights rounded column by column, each error made up for by the columns to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab import checks
from lowrank_lab.quantization.base import WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.quantization.codec import Quantized


class Gptq(WeightQuantizer):
    """Frantar et al. 2023, on dense linears as on factors: optimal_brain.py.

    damping    the share of the mean diagonal of the second moment that is added to it
    act_order  columns with large inputs first
    """

    needs_calibration = True
    label = "GPTQ"

    def __init__(self, weights: dict[str, Any], damping: float, act_order: bool) -> None:
        super().__init__(weights)
        checks.above(0, damping=damping)
        self.damping = damping
        self.act_order = act_order

    def quantize(self, weight: Tensor, second_moment: Tensor | None) -> Quantized:
        from lowrank_lab.quantization.optimal_brain import gptq

        assert second_moment is not None
        return gptq(weight, second_moment, self.weights, self.damping, self.act_order)
