"""GPTQ: weights rounded column by column, each error made up for by the columns to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.inputs import Inputs


class Gptq(WeightMethod):
    """Frantar et al. 2023, on dense linears as on factors: optimal_brain.py.

    damping    the share of the mean diagonal of the second moment that is added to it
    act_order  columns with large inputs first
    """

    label = "GPTQ"
    needs_inputs = True

    def __init__(self, damping: float, act_order: bool) -> None:
        checks.above(0, damping=damping)
        checks.flag(act_order=act_order)
        self.damping = damping
        self.act_order = act_order

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        from lowrank_lab.quantization.optimal_brain import gptq

        assert inputs is not None
        return gptq(weight, inputs.second_moment, form, self.damping, self.act_order)
