"""What a method that quantizes weights answers. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.errors import named
from lowrank_lab.modules.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.inputs import Inputs


class WeightMethod:
    """Quantizes weights, one linear at a time: those of dense linears and of factors.

    label         what tables show before the format; nothing for plain rounding
    needs_inputs  whether ``quantize`` reads statistics of the linear's input on the calibration text
    needs_rows    whether it also reads a sample of tokens
    needs_exact   whether it reads these tokens in the unquantized model too
    needs_seed    whether it draws random numbers
    library       the optional library that it uses
    """

    label = ""
    library: str | None = None
    needs_inputs = False
    needs_rows = False
    needs_exact = False
    needs_seed = False

    def check(self, form: Format) -> None:
        """Raises ValueError for a format that the method cannot make."""
        if form.grid == "codebook":
            raise ValueError("weights.grid=codebook is for quantization/method=kmeans; choose integer, nf4 or fp4")

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        """``weight`` (out, in) in the format."""
        raise NotImplementedError

    def quantize_together(
        self, weights: dict[str, Tensor], forms: dict[str, Format], inputs: Inputs | None
    ) -> dict[str, Quantized]:
        """Quantize the weights of linears with the same input, by name: one by one, unless a method overrides this.

        Raises FloatingPointError, naming the linear, where something is not finite.
        """
        quantized = {}
        for name, weight in weights.items():
            with named(name):
                quantized[name] = self.quantize(weight, forms[name], inputs)
        return quantized
