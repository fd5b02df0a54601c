"""Our rounding and GPTQ against llm-compressor and bitsandbytes, on what both can do.

    make test-libraries        installs the extra [quantization] into .venv and runs this file

Without the libraries all of it is skipped. What is compared, and how closely:

- RTN: every linear of a model, dense or factors, with and without zero point, per tensor, channel and group:
  equal to every digit.
- GPTQ from the same second moment: equal to every digit where both do the same, that is with a scale a tensor or a
  channel, and in groups with act_order; in float32, as the library computes it, a few codes may be others. In
  groups without act_order ours takes a group's scale from the weights that have made up for the errors so far, as
  the paper's code, the library's from the weights as they were: the error of ours is a little smaller.
- GPTQ of a whole model on the same text: all weights, each block calibrated on the quantized ones before it.
- NF4 in blocks: codes, scales and values equal to every digit. FP4 and 8 bits: the library's values.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes", reason="make test-libraries installs bitsandbytes")
pytest.importorskip("llmcompressor", reason="make test-libraries installs llm-compressor")

from bitsandbytes import functional
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize, helpers
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from lowrank_lab.models.load import load_model
from lowrank_lab.modules.codec import grids, quantize
from lowrank_lab.modules.factorized import FactorizedLinear, dense_weight, plain_linear
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.bnb import eight_bits, four_bits
from lowrank_lab.quantization.method.gptq import gptq
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context, pick_device

WIDTHS = [576, 1536, 500, 137, 1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(bits: int, **settings) -> Format:
    """Scales in float32, as the libraries keep them."""
    return Format(bits, scale_dtype="float32", **settings)


# bitsandbytes


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("width", WIDTHS)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(width, block):
    weight, form = random(200, width), full(4, grid="nf4", granularity=block)
    own, theirs = quantize(weight, form), four_bits(weight, form)
    assert torch.equal(own.codes, theirs.codes)
    assert torch.equal(own.scale, theirs.scale)
    padded = nn.functional.pad(weight, (0, -width % block))
    values = functional.dequantize_4bit(*functional.quantize_4bit(padded, blocksize=block, quant_type="nf4"))
    assert torch.equal(own.dequantize(), values[:, :width])


@pytest.mark.parametrize("width", WIDTHS)
def test_fp4_stands_for_the_values_of_bitsandbytes(width):
    weight, form = random(50, width), full(4, grid="fp4", granularity=64)
    padded = nn.functional.pad(weight, (0, -width % 64))
    values = functional.dequantize_4bit(*functional.quantize_4bit(padded, blocksize=64, quant_type="fp4"))
    torch.testing.assert_close(four_bits(weight, form).dequantize(), values[:, :width], rtol=1e-6, atol=0)
    torch.testing.assert_close(quantize(weight, form).dequantize(), values[:, :width], rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_eight_bits_stand_for_the_values_of_bitsandbytes(width):
    weight, form = random(50, width), full(8, symmetric=True)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)
    theirs = eight_bits(weight, form)
    torch.testing.assert_close(
        theirs.dequantize(), functional.int8_vectorwise_dequant(codes, absmax), rtol=1e-6, atol=0
    )
    assert theirs.codes.max() - theirs.codes.min() <= 254


def test_our_eight_bits_have_half_a_step_more():
    """255 steps of 2 max / 255 for 254 of max / 127: the error is 254 / 255 of theirs, but for the upper end."""
    weight, form = random(500, 1536), full(8, symmetric=True)
    error = lambda quantized: float((quantized.dequantize() - weight).norm())
    assert error(quantize(weight, form)) == pytest.approx(254 / 255 * error(eight_bits(weight, form)), rel=2e-3)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 137),
        torch.full((4, 137), -7.0),
        torch.full((4, 137), 1e-40),
        torch.cat([torch.full((4, 1), 1e4), 0.01 * random(4, 136)], dim=1),
        torch.cat([torch.zeros(1, 137), random(3, 137)]),
        random(4, 1),
        random(1, 137),
    ],
    ids=["zeros", "constant", "denormal", "outlier", "a row of zeros", "one input", "one output"],
)
def test_odd_weights_stay_finite(weight):
    for quantized in (
        four_bits(weight, full(4, grid="nf4", granularity=64)),
        four_bits(weight, full(4, grid="fp4", granularity=64)),
        eight_bits(weight, full(8, symmetric=True)),
    ):
        error = (quantized.dequantize() - weight).abs()
        assert torch.isfinite(error).all()
        assert error.max() <= weight.abs().max() * (1 + 1e-6)
        assert (quantized.scale > 0).all()


@pytest.mark.parametrize("rounded", [four_bits, eight_bits])
def test_a_weight_that_is_not_finite_raises(rounded):
    form = full(4, grid="nf4", granularity=64) if rounded is four_bits else full(8, symmetric=True)
    with pytest.raises(FloatingPointError, match="not finite"):
        rounded(torch.tensor([[1.0, math.inf]]), form)


# llm-compressor


def arguments(form: Format, act_order: bool = False) -> QuantizationArgs:
    grouped = isinstance(form.granularity, int)
    return QuantizationArgs(
        num_bits=form.bits,
        type="int",
        symmetric=form.symmetric,
        strategy="group" if grouped else form.granularity,
        group_size=form.granularity if grouped else None,
        actorder="static" if act_order else None,
    )


def load(folder) -> nn.Module:
    return load_model(str(folder), None, "float32", False)


def factorized(model: nn.Module, rank: int) -> nn.Module:
    """Every linear of the blocks as two of this ``rank``, with random values."""
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            left, right = (
                random(linear.out_features, rank, seed=len(name)),
                random(rank, linear.in_features),
            )
            model.model.set_submodule(name, FactorizedLinear(plain_linear(left, None), plain_linear(right, None)))
    return model


FORMS = [
    full(4), full(3, symmetric=True), full(8), full(6), full(4, granularity="tensor"),
    full(8, symmetric=True, granularity="tensor"),
]  # fmt: skip


IN_GROUPS = [full(4, granularity=16), full(3, symmetric=True, granularity=16)]


@pytest.mark.parametrize("form", [*FORMS, *IN_GROUPS], ids=str)
def test_rounding_of_a_dense_model_is_llm_compressors(checkpoints, form):
    assert compared_rounding(load(checkpoints["llama"]), form) == 21


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounding_of_factors_is_llm_compressors(checkpoints, form):
    """Of a rank that no group size divides: the library's groups must, so there are none here."""
    assert compared_rounding(factorized(load(checkpoints["llama"]), 37), form) == 42


def compared_rounding(model: nn.Module, form: Format) -> int:
    """Check that every linear is rounded as llm-compressor does; returns how many there are."""
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(form))
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"]))
    compared = 0
    for linear in model.modules():
        if hasattr(linear, "quantization_scheme"):  # its weight is still the full one: rounded in every forward
            its = linear.quantization_scheme.weights
            theirs = fake_quantize(linear.weight, linear.weight_scale, linear.weight_zero_point, its)
            assert not torch.equal(theirs, linear.weight)
            assert torch.equal(quantize(linear.weight.detach(), form).dequantize(), theirs)
            compared += 1
    return compared


WIDTH = 137


@pytest.fixture(scope="module")
def correlated() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (64, 137), inputs of it, and their second moment."""
    inputs = random(3000, WIDTH) @ random(WIDTH, WIDTH, seed=1)
    return random(64, WIDTH, seed=2), inputs, inputs.T @ inputs / 3000


def theirs_in(dtype: torch.dtype, monkeypatch, weight, moment, form: Format, act_order: bool) -> torch.Tensor:
    """The weight after llm-compressor's GPTQ, computed in ``dtype``."""
    for module in (gptq_quantize, helpers):
        monkeypatch.setattr(module, "GPTQ_PRECISION", dtype)
    scale, zero = grids(weight.to(dtype), form)
    zero = torch.zeros_like(scale) if zero is None else zero - 2 ** (form.bits - 1)
    alone = [tensor.to(dtype).unsqueeze(0).clone() for tensor in (weight, moment, scale, zero)]
    settings = arguments(form, act_order)
    found, _, rounded_instead = gptq_quantize.quantize_weight(*alone, None, settings, percdamp=0.01)
    assert not rounded_instead.any()
    return found[0]


SAME = [(form, act_order) for form in FORMS for act_order in (False, True)]
SAME += [(full(4, granularity=64), True), (full(3, symmetric=True, granularity=50), True)]


@pytest.mark.parametrize(("form", "act_order"), SAME, ids=str)
def test_gptq_is_llm_compressors(correlated, monkeypatch, form, act_order):
    weight, inputs, moment = correlated
    own = gptq(weight, moment, form, 0.01, act_order).dequantize()
    exact = theirs_in(torch.float64, monkeypatch, weight, moment, form, act_order)
    torch.testing.assert_close(own.double(), exact, rtol=1e-6, atol=1e-6)
    shipped = theirs_in(torch.float32, monkeypatch, weight, moment, form, act_order)
    assert ((shipped - own).abs() > 1e-5).float().mean() < 0.01
    error = lambda found: float(((found.double() - weight.double()) @ inputs.double().T).norm())
    assert error(own) == pytest.approx(error(shipped), rel=2e-3)


@pytest.mark.parametrize("group", [50, 64])
def test_gptq_in_groups_takes_the_scales_of_what_is_left(correlated, monkeypatch, group):
    weight, inputs, moment = correlated
    form = full(4, granularity=group)
    error = lambda found: float(((found.double() - weight.double()) @ inputs.double().T).norm())
    theirs = theirs_in(torch.float32, monkeypatch, weight, moment, form, False)
    ratio = error(gptq(weight, moment, form).dequantize()) / error(theirs)
    assert 0.9 < ratio < 1.0


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_a_model_is_llm_compressors(lab, act_order):
    """The same text through both: every weight of every block."""
    settings = [
        "method=dense", "quantization=gptq", f"quantization.method.act_order={str(act_order).lower()}",
        "quantization.weights.scale_dtype=float32",
    ]  # fmt: skip
    [cell] = lab.cells(*settings)
    ours, theirs = (Context(cell, Record(cell, None), pick_device("cpu")) for _ in range(2))
    cell.compressions["quantization"].apply(ours, {})
    windows = [{"input_ids": ids.unsqueeze(0)} for ids in theirs.calibration_ids]
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(cell.compressions["quantization"].weights))
    recipe = GPTQModifier(
        config_groups={"all": scheme}, ignore=["lm_head"], actorder="static" if act_order else None
    )
    loader = DataLoader(windows, batch_size=None)
    oneshot(model=theirs.model, recipe=recipe, dataset=loader, num_calibration_samples=len(windows))
    compared = 0
    for name, linear in theirs.model.named_modules():
        if hasattr(linear, "quantization_scheme"):
            own = ours.model.get_submodule(name).weight
            step = linear.weight_scale
            assert ((own - dense_weight(linear)).abs() > 0.01 * step).float().mean() < 0.01
            compared += 1
    assert compared == 21
