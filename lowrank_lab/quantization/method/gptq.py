"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, and those to come take over the error.

It is OBQ's rule (Frantar and Alistarh 2022) with one order for all rows, made fast by the Cholesky factor of H⁻¹.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import Quantized, check_finite, decode, encode, grids
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.modules import positive
    from lowrank_lab.quantization.inputs import Inputs
else:
    torch = LazyModule("torch")
    positive = LazyModule("lowrank_lab.modules.positive")

BLOCK = 128  # columns whose errors reach the columns after them at once: speed alone


class Gptq(WeightMethod):
    """GPTQ on dense linears and on factors.

    damping    the share of the mean diagonal of the second moment that is added to it
    act_order  columns with large inputs first
    """

    needs_inputs = True

    def __init__(self, damping: float, act_order: bool) -> None:
        checks.above(0, damping=damping)
        checks.flag(act_order=act_order)
        self.damping = damping
        self.act_order = act_order

    @property
    def label(self) -> str:  # type: ignore[override]
        """GPTQ-R, with reordering, is AWQ's name (Lin et al. 2024) of act-order."""
        return "GPTQ-R" if self.act_order else "GPTQ"

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        assert inputs is not None
        return gptq(weight, inputs.second_moment, form, self.damping, self.act_order)


def gptq(
    weight: Tensor, second_moment: Tensor, form: Format, damping: float = 0.01, act_order: bool = False
) -> Quantized:
    """Quantize ``weight`` (out, in) so that ‖(W − W') X‖ is small, given ``second_moment`` (in, in), the mean x xᵀ.

    damping    the share of its mean diagonal that is added to it
    act_order  columns of large inputs first; the grids of groups are then those of the weight as it was

    Columns whose input is always zero are rounded as they are. Computed in float64. Raises FloatingPointError where
    a weight or moment is not finite.
    """
    check_finite(weight)
    check_finite(second_moment, "the second moment of its inputs")
    width = weight.shape[1]
    weight, energy = weight.double(), second_moment.diagonal().double()
    added = torch.where(energy > 0, damping * energy.mean(), torch.ones_like(energy))
    order = energy.argsort(descending=True) if act_order else torch.arange(width, device=weight.device)
    upper = positive.inverse_cholesky((second_moment.double() + torch.diag(added))[order][:, order])

    scale, zero = grids(weight, form)
    in_groups = isinstance(form.granularity, int) and not act_order  # then a group's grid is that of its last state
    group = form.group_of(width)
    block = group * math.ceil(BLOCK / group) if in_groups else BLOCK
    remaining = weight[:, order]  # takes over the errors of the columns before
    codes = torch.empty_like(remaining, dtype=torch.uint8)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = remaining.new_zeros(len(remaining), stop - start)
        for step in range(start, stop):
            if in_groups and step % group == 0:
                found = grids(remaining[:, step : step + group], form)
                scale[:, step // group] = found[0][:, 0]
                if zero is not None and found[1] is not None:
                    zero[:, step // group] = found[1][:, 0]
            column_group = int(order[step]) // group if scale.shape[1] > 1 else 0
            column_scale = scale[:, column_group].expand(len(remaining))
            column_zero = None if zero is None else zero[:, column_group].expand(len(remaining))
            codes[:, step] = encode(remaining[:, step], form, column_scale, column_zero)
            rounded = decode(codes[:, step], form, column_scale, column_zero)
            error = (remaining[:, step] - rounded) / upper[step, step]
            remaining[:, step:stop] -= torch.outer(error, upper[step, step:stop])
            errors[:, step - start] = error
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return Quantized(form, unordered, scale.float(), None if zero is None else zero.float())
