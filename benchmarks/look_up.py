"""A linear layer without multiplications of its operands: products are looked up in tables, then added.

Inputs of 4 bits and weights of K centroids have only 16 · K different products (the lecture on efficient language
models, "LUT-based LLM inference"). This is the reference of such a kernel, to be checked against, not a fast one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_lab.modules.codec import Quantized

FIXED = 2**24  # every float16 is a whole multiple of 1 / FIXED


def look_up_linear(x: Quantized, weight: Quantized) -> Tensor:
    """x Wᵀ for ``x`` (tokens, in) and ``weight`` (out, in): (tokens, out), float64.

    ``x`` is on an integer grid of 4 bits with a scale a token or one for all, ``weight`` of codebooks in float16.
    With code a, zero point z and scale s of an input, entry c and scale t of a codebook,

        Σ (a − z) s · c t  =  s t / FIXED · (Σ table[a, c] − z Σ c FIXED),     table[a, c] = a c FIXED

    Tables and sums are integers of 64 bits, hence exact: |a c| FIXED < 2^44, and up to 2^18 inputs are added. So is
    s · t in float64, of 24 + 24 bits. Rounded is what a codebook gives, once (twice from 2^53 on, which 2^10 inputs
    cannot reach with codebooks below 2^15), and the sum where a row has several. Raises ValueError for formats that
    are none of these.
    """
    if (x.format.bits, x.format.grid) != (4, "integer") or isinstance(x.format.granularity, int):
        raise ValueError(f"inputs in {x.format.name} cannot be looked up; they need 4 bits and a scale a token")
    if weight.codebook is None or weight.format.scale_dtype != "float16":
        raise ValueError(f"weights in {weight.format.name} cannot be looked up; they need codebooks in float16")
    tokens, (out, width) = len(x.codes), weight.codes.shape
    if width > 2**18:
        raise ValueError(f"{width} inputs are more than 64-bit sums of products hold for sure")
    entries = (weight.codebook.double() * FIXED).to(torch.int64).expand(out, -1, -1)  # (out, groups, K)
    number = entries.shape[2]
    codes = torch.arange(16, device=entries.device)
    table = (codes.unsqueeze(1) * entries.unsqueeze(2)).flatten()  # of out · groups codebooks, 16 · K entries each

    size = weight.format.group_of(width)
    group = torch.arange(width, device=entries.device) // size
    groups = entries.shape[1]
    book = torch.arange(out, device=entries.device).unsqueeze(1) * groups + (group if groups > 1 else 0)
    first = book * 16 * number + weight.codes  # (out, in): where the products of each weight begin
    sums = torch.empty(tokens, out, groups, dtype=torch.int64, device=entries.device)
    for token in range(tokens):
        products = table[first + x.codes[token].long() * number]
        sums[token] = _by_group(products, group, groups)
    of_weights = _by_group(entries.flatten()[book * number + weight.codes], group, groups)

    zero = torch.full_like(x.scale, 8) if x.zero is None else x.zero
    sums -= zero.long().unsqueeze(2) * of_weights
    scales = (x.scale.double() / FIXED).unsqueeze(2) * weight.scale.double()
    return (sums * scales).sum(2)


def _by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums (out, groups) of ``values`` (out, in) over the columns of each group."""
    if groups == 1:
        return values.sum(1, keepdim=True)
    return values.new_zeros(len(values), groups).index_add_(1, group, values)
