"""Rounding by bitsandbytes: NF4 and FP4 in blocks (QLoRA), LLM.int8's 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.inputs import Inputs

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytes(WeightMethod):
    """The library finds the codes; they are kept, saved and multiplied with as all others: bits_and_bytes.py."""

    label = library = "bitsandbytes"

    def check(self, form: Format) -> None:
        if form.grid in ("nf4", "fp4"):
            if form.granularity not in BLOCKS:
                blocks = ", ".join(str(block) for block in BLOCKS)
                raise ValueError(f"granularity={form.granularity}: bitsandbytes has blocks of {blocks}")
        elif (form.bits, form.grid, form.symmetric, form.granularity) != (8, "integer", True, "channel"):
            raise ValueError(
                f"bitsandbytes cannot make {form.name}; it has grid=nf4 and fp4, and 8 bits with symmetric=true "
                "and granularity=channel"
            )
        if form.scale_dtype != "float32":
            raise ValueError(f"scale_dtype={form.scale_dtype}: bitsandbytes finds codes for float32")

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        from lowrank_lab.quantization.bits_and_bytes import eight_bits, four_bits

        return eight_bits(weight, form) if form.bits == 8 else four_bits(weight, form)
