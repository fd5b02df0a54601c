"""A linear layer without multiplications of its operands: products are looked up in tables, then added.

Inputs of 4 bits and weights of K centroids have only 16 · K different products (the lecture on efficient language
models, "LUT-based LLM inference"). This is the reference of such a kernel, to be checked against, not a fast one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import Quantized
from lowrank_lab.modules.formats import Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

FIXED = 2**24  # every float16 is a whole multiple of 1 / FIXED


def why_not(x: Format, weight: Format) -> str | None:
    """Why products of inputs and weights in these formats cannot be looked up; None: they can."""
    if (x.bits, x.grid) != (4, "integer") or isinstance(x.granularity, int):
        return f"inputs in {x.name} cannot be looked up; they need 4 bits and a scale a token"
    if weight.grid != "codebook" or weight.scale_dtype != "float16":
        return f"weights in {weight.name} cannot be looked up; they need codebooks in float16"
    return None


def tables(weight: Quantized) -> Tensor:
    """The products of all 16 codes of an input and the K entries of each codebook, times FIXED.

    (rows, groups, 16, K), int64; rows is 1 where the whole weight has one codebook.
    """
    assert weight.codebook is not None
    entries = (weight.codebook.double() * FIXED).to(torch.int64)
    return torch.arange(16, device=entries.device).unsqueeze(1) * entries.unsqueeze(2)


def look_up_linear(x: Quantized, weight: Quantized) -> Tensor:
    """x Wᵀ for ``x`` (tokens, in) and ``weight`` (out, in): (tokens, out), float64.

    ``x`` is on an integer grid of 4 bits with a scale a token or one for all, ``weight`` of codebooks in float16.
    With code a, zero point z and scale s of an input, entry c and scale t of a codebook,

        Σ (a − z) s · c t  =  s t / FIXED · (Σ table[a, c] − z Σ table[1, c]),     table[a, c] = a c FIXED

    Tables and sums are integers of 64 bits, hence exact: |a c| FIXED < 2^44, and up to 2^18 inputs are added. So is
    s · t in float64, of 24 + 24 bits. Rounded is what a codebook gives, once (twice from 2^53 on, which 2^10 inputs
    cannot reach with codebooks below 2^15), and the sum where a row has several. Raises ValueError for formats that
    are none of these.
    """
    if reason := why_not(x.format, weight.format):
        raise ValueError(reason)
    tokens, (out, width) = len(x.codes), weight.codes.shape
    if width > 2**18:
        raise ValueError(f"{width} inputs are more than 64-bit sums of products hold for sure")
    products = tables(weight)
    rows, groups, _, number = products.shape
    flat, device = products.flatten(), products.device

    group = torch.arange(width, device=device) // weight.format.group_of(width)
    row = torch.arange(out, device=device) if rows > 1 else torch.zeros(out, dtype=torch.int64, device=device)
    book = row.unsqueeze(1) * groups + (group if groups > 1 else 0)
    first = book * 16 * number + weight.codes  # (out, in): where the products of each weight begin
    sums = torch.empty(tokens, out, groups, dtype=torch.int64, device=device)
    for token in range(tokens):
        sums[token] = _by_group(flat[first + x.codes[token].long() * number], group, groups)
    of_weights = _by_group(flat[first + number], group, groups)  # of code 1: the entries themselves

    zero = torch.full_like(x.scale, 8) if x.zero is None else x.zero
    sums -= zero.long().unsqueeze(2) * of_weights
    scales = (x.scale.double() / FIXED).unsqueeze(2) * weight.scale.double()
    return (sums * scales).sum(2)


def _by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums (out, groups) of ``values`` (out, in) over the columns of each group."""
    if groups == 1:
        return values.sum(1, keepdim=True)
    return values.new_zeros(len(values), groups).index_add_(1, group, values)
