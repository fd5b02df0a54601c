"""Packed codes: the fast ways to bytes and back against the plain ones, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_lab.modules.codec import Quantized, decode, pack, quantize, spread, unpack
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.quantized import QuantizedLinear

RAGGED = 137  # a rank that no group size divides


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, bits: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


def bit_by_bit(codes: Tensor, bits: int) -> Tensor:
    """What the bytes are: bit b of code c is bit c · bits + b of the stream, and a byte's first bit its lowest."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.flatten().unsqueeze(-1) >> shifts) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def value_by_value(quantized: Quantized) -> Tensor:
    """What the codes stand for, with a scale, a zero point and a codebook for every column."""
    width = quantized.codes.shape[1]
    scale = spread(quantized.scale, quantized.format, width)
    if quantized.codebook is None:
        zero = None if quantized.zero is None else spread(quantized.zero, quantized.format, width)
        return decode(quantized.codes, quantized.format, scale, zero)
    group = torch.arange(width) // quantized.format.group_of(width)
    rows = torch.arange(len(quantized.codes)).unsqueeze(1)
    codebook = quantized.codebook.expand(len(rows), *quantized.codebook.shape[1:])
    return codebook[rows, group, quantized.codes.long()] * scale


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (64, 24), (5, RAGGED)])
def test_the_bytes_are_the_stream_of_all_bits(bits, shape):
    codes = random_codes(*shape, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, bit_by_bit(codes, bits))
    assert len(packed) == math.ceil(math.prod(shape) * bits / 8)
    assert torch.equal(unpack(packed, bits, shape), codes)
    assert torch.equal(packed, bit_by_bit(codes, bits))  # unpacking leaves them as they are


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_that_lie_apart_or_begin_anywhere_in_memory(bits):
    """A column of a matrix is packed, and bytes are unpacked that begin at no multiple of a word."""
    codes = random_codes(40, 3, bits=bits)[:, 1]
    packed = pack(codes, bits)
    assert torch.equal(packed, bit_by_bit(codes, bits))
    moved = torch.cat([torch.full((3,), 255, dtype=torch.uint8), packed])[3:]
    assert torch.equal(unpack(moved, bits, (40,)), codes)


def test_packed_codes_share_no_memory_with_the_codes():
    codes = random_codes(4, 8, bits=8)
    packed = pack(codes, 8)
    codes.zero_()
    assert packed.any()


FORMATS = [
    Format(bits, grid, bits == 3, granularity, scale_dtype)
    for bits, grid in ((8, "integer"), (3, "integer"), (4, "nf4"), (4, "fp4"), (4, "codebook"))
    for granularity in ("tensor", "channel", 32, 500)
    for scale_dtype in ("float32", "float16", "bfloat16")
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name} {form.scale_dtype}")
def test_a_weight_is_what_its_codes_stand_for_one_by_one(form):
    shape = (9, RAGGED)
    if form.grid == "codebook":
        kept = getattr(torch, form.scale_dtype)
        scales = form.scales(shape)
        scale, codebook = (random(*size).to(kept).float() for size in (scales, (*scales, 2**form.bits)))
        quantized = Quantized(form, random_codes(*shape, bits=form.bits), scale, None, codebook)
    else:
        quantized = quantize(random(*shape), form)
    expected = value_by_value(quantized)
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(QuantizedLinear.of(quantized, None).weight, expected)
