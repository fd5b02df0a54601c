"""AdaQuant: the weights, the steps of their grids and that of the input learned, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.inputs import Inputs


class AdaQuant(WeightMethod):
    """Hubara et al. 2020: descent.py. Linears that share an input are learned together, as they share its step.

    steps         of Adam
    batch_size    tokens in each
    weight_rate   learning rate of what is added to the weights, in steps of their grids
    scale_rate    of the logarithm of these steps
    input_rate    of the logarithm of the step of the input, where that is one for all tokens
    """

    label = "AdaQuant"
    needs_rows = True

    def __init__(
        self, steps: int, batch_size: int, weight_rate: float, scale_rate: float, input_rate: float
    ) -> None:
        checks.whole(1, steps=steps, batch_size=batch_size)
        checks.above(0, weight_rate=weight_rate, scale_rate=scale_rate, input_rate=input_rate)
        self.steps, self.batch_size = steps, batch_size
        self.weight_rate, self.scale_rate, self.input_rate = weight_rate, scale_rate, input_rate

    def check(self, form: Format) -> None:
        if form.grid != "integer":
            raise ValueError(f"weights.grid={form.grid} has no step that AdaQuant could learn; choose integer")

    def quantize_together(
        self, weights: dict[str, Tensor], forms: dict[str, Format], inputs: Inputs | None
    ) -> dict[str, Quantized]:
        from lowrank_lab.quantization.descent import Descent, adaquant

        assert inputs is not None and inputs.rows is not None
        descent = Descent(self.steps, self.batch_size, self.weight_rate, self.scale_rate, self.input_rate)
        given = inputs.rows, inputs.rounding, descent
        try:
            return dict(zip(weights, adaquant(list(weights.values()), list(forms.values()), *given), strict=True))
        except FloatingPointError as error:
            raise FloatingPointError(f"{', '.join(weights)}: {error}") from None
