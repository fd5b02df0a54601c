"""Codes that bitsandbytes finds, as a ``Quantized``.

Its functions run on the CPU, so that the codes are the same whatever the model runs on: those for GPUs take other
dtypes. Its own layers are not used: the blocks of their 4 bits run over the rows' ends, and where a block does
not divide the width of a row, what they multiply with is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.modules.codec import TABLES, Quantized, check_finite
from lowrank_lab.modules.formats import Format

SMALLEST = 1e-30  # of a row's largest value: far below, 127 / value is infinite and what is rounded not a number


def four_bits(weight: Tensor, form: Format) -> Quantized:
    """``weight`` (out, in) rounded to NF4 or FP4 by ``quantize_4bit`` (Dettmers et al. 2023), each block a group.

    Rows are filled up to whole blocks with zeros, which are no block's largest value. Raises FloatingPointError
    where a weight is not finite.
    """
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    check_finite(weight)
    assert isinstance(form.granularity, int)
    (rows, width), block = weight.shape, form.granularity
    whole = torch.nn.functional.pad(weight.float().cpu(), (0, -width % block))
    packed, state = quantize_4bit(whole, blocksize=block, quant_type=form.grid)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(whole.shape)[:, :width]
    of_ours = torch.tensor(TABLES[form.grid])
    ours = (get_4bit_type(form.grid, device="cpu").unsqueeze(1) - of_ours).abs().argmin(1)  # by the library's code
    absmax = state.absmax.view(rows, -1)
    scale = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    return Quantized(form, ours[codes.long()].to(torch.uint8).to(weight.device), scale.to(weight.device))


def eight_bits(weight: Tensor, form: Format) -> Quantized:
    """``weight`` (out, in) in LLM.int8's format (Dettmers et al. 2022) by ``int8_vectorwise_quant``: −127 to 127
    times the largest value of a row over 127.

    The outliers that LLM.int8 takes out are those of activations; a weight has none. Raises FloatingPointError
    where a weight is not finite.
    """
    from bitsandbytes.functional import int8_vectorwise_quant

    check_finite(weight)
    found, absmax, _ = int8_vectorwise_quant(weight.float().cpu().contiguous())
    there = (absmax > SMALLEST).unsqueeze(1)
    codes = torch.where(there, found.short() + 128, 128).to(torch.uint8)
    scale = torch.where(there, absmax.unsqueeze(1) / 127, 1.0)
    return Quantized(form, codes.to(weight.device), scale.to(weight.device))
