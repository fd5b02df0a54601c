"""Rounding that gradients pass through, for learning on rounded numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.scales import rounded


class RoundToSteps(torch.autograd.Function):
    """Values rounded to those of an integer grid; backwards, the identity within it, and a constant beyond it.

    ``apply(x, scale, zero, bits)`` with x (rows, width); scale and zero, the code of 0, broadcast with it. The
    gradient of the scale is Σ g (code − zero − x / scale), without x / scale for values beyond the grid.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
        steps = x / scale
        nearest = steps.round()
        codes = nearest + zero
        codes = codes.clamp_(0, 2**bits - 1).sub_(zero)
        within = (codes == nearest).to(x.dtype)
        ctx.save_for_backward(codes - steps * within, within)
        ctx.shape = scale.shape
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        by_scale, within = ctx.saved_tensors
        of_scale = (gradient * by_scale).sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None
        return gradient * within if ctx.needs_input_grad[0] else None, of_scale, None, None


def rounded_values(x: Tensor, form: Format) -> Tensor:
    """``x`` rounded to ``form``, with the gradient of ``x``."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return x + (rounded(rows, form).view_as(x) - x.detach())


class RoundInputs(nn.Module):
    """A step that rounds activations straight through. Fixed scales are those of each batch here."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return rounded_values(x, self.form)
