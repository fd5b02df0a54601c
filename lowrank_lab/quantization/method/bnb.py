"""Rounding by bitsandbytes: NF4 and FP4 in blocks (QLoRA), LLM.int8's 8 bits.

The library's functions run on the CPU, so that the codes are the same whatever the model runs on: those for GPUs
take other dtypes. Its layers are not used: their blocks of 4 bits cross the ends of rows, and where a block does
not divide the width of a row, they multiply with wrong values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import TABLES, Quantized, check_finite
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    import torch
    from bitsandbytes import functional as bitsandbytes
    from torch import Tensor

    from lowrank_lab.quantization.inputs import Inputs
else:
    torch, bitsandbytes = LazyModule("torch"), LazyModule("bitsandbytes.functional")

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SMALLEST = 1e-30  # of a row's largest value: far below, 127 / value is infinite and what is rounded not a number


class BitsAndBytes(WeightMethod):
    """The library finds the codes; they are kept, saved and multiplied with like all others."""

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
        return eight_bits(weight, form) if form.bits == 8 else four_bits(weight, form)


def four_bits(weight: Tensor, form: Format) -> Quantized:
    """``weight`` (out, in) rounded to NF4 or FP4 by ``quantize_4bit`` (Dettmers et al. 2023), each block a group.

    Rows are filled up to whole blocks with zeros, which are no block's largest value. Raises FloatingPointError
    where a weight is not finite.
    """
    check_finite(weight)
    assert isinstance(form.granularity, int)
    (rows, width), block = weight.shape, form.granularity
    whole = torch.nn.functional.pad(weight.float().cpu(), (0, -width % block))
    packed, state = bitsandbytes.quantize_4bit(whole, blocksize=block, quant_type=form.grid)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(whole.shape)[:, :width]
    of_ours = torch.tensor(TABLES[form.grid])
    ours = (
        (bitsandbytes.get_4bit_type(form.grid, device="cpu").unsqueeze(1) - of_ours).abs().argmin(1)
    )  # by the library's code
    absmax = state.absmax.view(rows, -1)
    scale = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    return Quantized(form, ours[codes.long()].to(torch.uint8).to(weight.device), scale.to(weight.device))


def eight_bits(weight: Tensor, form: Format) -> Quantized:
    """``weight`` (out, in) in LLM.int8's format (Dettmers et al. 2022) by ``int8_vectorwise_quant``: −127 to 127
    times the largest value of a row over 127.

    The outliers that LLM.int8 takes out are those of activations; a weight has none. Raises FloatingPointError
    where a weight is not finite.
    """
    check_finite(weight)
    found, absmax, _ = bitsandbytes.int8_vectorwise_quant(weight.float().cpu().contiguous())
    nonzero = (absmax > SMALLEST).unsqueeze(1)
    codes = torch.where(nonzero, found.short() + 128, 128).to(torch.uint8)
    scale = torch.where(nonzero, absmax.unsqueeze(1) / 127, 1.0)
    return Quantized(form, codes.to(weight.device), scale.to(weight.device))
