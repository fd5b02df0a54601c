"""AdaQuant (Hubara et al. 2020): weights and steps of the grids learned, so that a layer keeps its outputs.

Minimise ‖W X − Q(W + V) Q(X)‖² over V and the step Δw of every channel or group, and over the step Δx of the input
where that is one for all tokens, by Adam with rounding as the identity in the backward pass (straight through).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import Quantized, check_finite, encode, grids, spread
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.modules.steps import Round
    from lowrank_lab.quantization import straight_through
    from lowrank_lab.quantization.inputs import Inputs
else:
    torch = LazyModule("torch")
    straight_through = LazyModule("lowrank_lab.quantization.straight_through")


@dataclass(frozen=True)
class Descent:
    """Learning by Adam, whose rates fall to zero along a line.

    steps        how many
    batch_size   tokens in each
    weight_rate  learning rate of V, in units of the first Δw
    scale_rate   learning rate of log Δw
    input_rate   learning rate of log Δx
    """

    steps: int
    batch_size: int
    weight_rate: float
    scale_rate: float
    input_rate: float


class AdaQuant(WeightMethod):
    """AdaQuant. Linears that share an input are learned together, as they share its step.

    The settings are those of ``Descent``.
    """

    label = "AdaQuant"
    needs_rows = True

    def __init__(
        self, steps: int, batch_size: int, weight_rate: float, scale_rate: float, input_rate: float
    ) -> None:
        checks.whole(1, steps=steps, batch_size=batch_size)
        checks.above(0, weight_rate=weight_rate, scale_rate=scale_rate, input_rate=input_rate)
        self.descent = Descent(steps, batch_size, weight_rate, scale_rate, input_rate)

    def check(self, form: Format) -> None:
        if form.grid != "integer":
            raise ValueError(f"weights.grid={form.grid} has no step that AdaQuant could learn; choose integer")

    def quantize_together(
        self, weights: dict[str, Tensor], forms: dict[str, Format], inputs: Inputs | None
    ) -> dict[str, Quantized]:
        assert inputs is not None and inputs.rows is not None
        given = inputs.rows, inputs.rounding, self.descent, inputs.exact_rows
        with named(", ".join(weights)):
            return dict(zip(weights, adaquant(list(weights.values()), list(forms.values()), *given), strict=True))


class SequentialAdaQuant(AdaQuant):
    """‖Wₗ Xₗ − Q(Wₗ + Vₗ) Q(X^qₗ)‖² (papers/000): X^q from the quantized layers before, X from unquantized ones.

    The layers are those of a block, one after the other; within a block none is quantized yet.
    """

    label = "sequential AdaQuant"
    needs_exact = True


class _Linear:
    """A weight (out, in) while it is learned: W + V in units of its first Δw, and log of Δw in these units."""

    def __init__(self, weight: Tensor, form: Format) -> None:
        check_finite(weight)
        self.weight, self.form = weight.float(), form
        self.scale, self.zero = grids(self.weight, form)
        self.moved = (self.weight / self._by_column(self.scale)).requires_grad_()
        self.stretch = torch.zeros_like(self.scale, requires_grad=True)

    def kept_scale(self) -> Tensor:
        """Δw as it will be stored; the first one where that would be none."""
        kept = (self.scale * self.stretch.exp()).to(getattr(torch, self.form.scale_dtype)).float()
        return torch.where((kept > 0) & kept.isfinite(), kept, self.scale).detach()

    def values(self) -> Tensor:
        """Q(W + V), with gradients."""
        stretch = self.stretch.exp()
        as_kept = stretch * (self.kept_scale() / self.scale / stretch).detach()
        rounded = straight_through.RoundToSteps.apply(
            self.moved, self._by_column(as_kept), self._zero(), self.form.bits
        )
        return rounded * self._by_column(self.scale)

    def quantized(self) -> Quantized:
        scale = self.kept_scale()
        codes = encode(self.moved.detach(), self.form, self._by_column(scale / self.scale), self._zero())
        return Quantized(self.form, codes, scale, self.zero)

    def _zero(self) -> Tensor:
        zero = torch.full_like(self.scale, 2 ** (self.form.bits - 1)) if self.zero is None else self.zero
        return self._by_column(zero)

    def _by_column(self, values: Tensor) -> Tensor:
        return values if values.shape[1] == 1 else spread(values, self.form, self.weight.shape[1])


def adaquant(
    weights: list[Tensor],
    forms: list[Format],
    rows: Tensor,
    rounding: Round | None,
    descent: Descent,
    exact_rows: Tensor | None = None,
) -> list[Quantized]:
    """Quantize ``weights``, each (out, in), of linears that share their input, in integer formats.

    rows        tokens (count, in) of that input, before it is rounded
    rounding    what rounds it, if anything does; its scale is learned where it is a fixed one, and then changed
    exact_rows  the same tokens (count, in) in the unquantized model, whose outputs are then wanted; None: of rows

    Σ ‖X Wᵀ − Q(X) Q(W + V)ᵀ‖² over ``rows`` is never above that of rounding to the nearest, where the descent
    begins: a worse result is not kept, channel by channel where output channels do not share a step. Raises
    FloatingPointError where a weight or row is not finite.
    """
    check_finite(rows, "an input")
    linears = [_Linear(weight, form) for weight, form in zip(weights, forms, strict=True)]
    rows = rows.float()
    exact = rows if exact_rows is None else exact_rows.float()
    check_finite(exact, "an input")
    wanted = [exact @ linear.weight.T for linear in linears]

    def errors(given: Tensor, quantized: list[Quantized]) -> list[Tensor]:
        """The squared error of every output."""
        pairs = zip(quantized, wanted, strict=True)
        return [(given @ weight.dequantize().T - output).square().sum(0) for weight, output in pairs]

    given = rows if rounding is None else rounding(rows)
    first = [linear.quantized() for linear in linears]
    before = errors(given, first)
    total = float(sum(error.sum() for error in before))
    if total == 0:
        return first
    learned = rounding if rounding is not None and rounding.static else None
    input_stretch = _descend(linears, wanted, rows if learned is not None else given, learned, total, descent)
    last = [linear.quantized() for linear in linears]
    if learned is None:
        return [_better(*both) for both in zip(first, before, last, errors(given, last), strict=True)]
    scale = learned.get_parameter("scale")
    start = scale.data
    scale.data = start * input_stretch.exp()
    if float(sum(error.sum() for error in errors(learned(rows), last))) < total:
        return last
    scale.data = start
    return first


def _descend(
    linears: list[_Linear],
    wanted: list[Tensor],
    rows: Tensor,
    rounding: Round | None,
    total: float,
    descent: Descent,
) -> Tensor:
    """Learn what the ``linears`` have to learn, and, given a fixed ``rounding``, log of how its scale changes."""
    stretch = torch.zeros(1, 1, device=rows.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [
            {"params": [linear.moved for linear in linears], "lr": descent.weight_rate},
            {"params": [linear.stretch for linear in linears], "lr": descent.scale_rate},
            {"params": [stretch] if rounding is not None else [], "lr": descent.input_rate},
        ],
        eps=1e-16,  # where rows of a weight differ by orders of magnitude, so do their gradients
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, descent.steps)
    batches = max(1, len(rows) // descent.batch_size)
    for step in range(descent.steps):
        batch = slice(step % batches, None, batches)
        with torch.enable_grad():
            given = rows[batch]
            if rounding is not None:
                scale, zero = rounding.fixed()
                middle = 2.0 ** (rounding.form.bits - 1) if zero is None else zero
                given = straight_through.RoundToSteps.apply(
                    given, scale * stretch.exp(), middle, rounding.form.bits
                )
            pairs = zip(linears, wanted, strict=True)
            loss = sum((given @ linear.values().T - output[batch]).square().sum() for linear, output in pairs)
            assert isinstance(loss, torch.Tensor)
            (loss / total).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return stretch.detach()


def _better(first: Quantized, before: Tensor, last: Quantized, after: Tensor) -> Quantized:
    """The better of two, given their squared errors (out,): by row, or as a whole where all rows share a scale."""
    if len(first.scale) < len(before):
        return last if after.sum() < before.sum() else first
    improved = (after < before).unsqueeze(1)
    codes = torch.where(improved, last.codes, first.codes)
    return Quantized(first.format, codes, torch.where(improved, last.scale, first.scale), first.zero)
