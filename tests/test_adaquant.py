"""AdaQuant: its gradients, its loss against rounding to the nearest, learned steps, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.codec import quantize
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.steps import Round
from lowrank_lab.quantization.base import quantize_model
from lowrank_lab.quantization.inputs import Inputs
from lowrank_lab.quantization.method.adaquant import AdaQuant, Descent, adaquant
from lowrank_lab.quantization.straight_through import RoundToSteps
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context

from .conftest import load_lively

WIDTH = 70  # no multiple of a group of 32
SHORT = Descent(steps=40, batch_size=64, weight_rate=0.003, scale_rate=0.01, input_rate=0.03)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(width: int = WIDTH, count: int = 256) -> Tensor:
    """Inputs whose channels are correlated and of different sizes."""
    return random(count, width) @ random(width, width, seed=1) * random(width, seed=2)


def errors(weight: Tensor, quantized, rows: Tensor, rounding: Round | None = None) -> Tensor:
    """The squared error of every output over ``rows``."""
    given = rows if rounding is None else rounding(rows)
    return (given @ quantized.dequantize().T - rows @ weight.T).square().sum(0)


def static_rounding(rows: Tensor, bits: int, symmetric: bool = True) -> Round:
    step = Round({"bits": bits, "symmetric": symmetric, "granularity": "tensor", "scale_dtype": "float32"})
    step.fix(rows.min(), rows.max())
    return step


FORMS = [
    Format(4),
    Format(3, symmetric=True),
    Format(2, granularity=32),
    Format(4, granularity="tensor", scale_dtype="float32"),
    Format(8, scale_dtype="bfloat16"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@torch.no_grad()
def test_the_loss_falls_for_every_output(form):
    weight, rows = random(24, WIDTH, seed=3), tokens()
    [learned] = adaquant([weight], [form], rows, None, SHORT)
    before, after = errors(weight, quantize(weight, form), rows), errors(weight, learned, rows)
    if form.granularity != "tensor":
        assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert learned.scale.shape == form.scales(weight.shape)
    assert torch.equal(learned.scale.to(getattr(torch, form.scale_dtype)).float(), learned.scale)


@torch.no_grad()
def test_a_loss_that_only_rises_leaves_rounding_to_the_nearest():
    """With a rate that throws the weights about, what is kept is the beginning."""
    weight, rows, form = random(24, WIDTH, seed=3), tokens(), Format(4, granularity="tensor")
    wild = Descent(steps=3, batch_size=64, weight_rate=50.0, scale_rate=1.0, input_rate=1.0)
    [kept] = adaquant([weight], [form], rows, None, wild)
    nearest = quantize(weight, form)
    assert torch.equal(kept.codes, nearest.codes) and torch.equal(kept.scale, nearest.scale)
    rounding = static_rounding(rows, 4)
    scale = rounding.get_parameter("scale").clone()
    [kept] = adaquant([weight], [form], rows, rounding, wild)
    assert torch.equal(kept.codes, nearest.codes)
    assert torch.equal(rounding.get_parameter("scale"), scale)


@pytest.mark.parametrize("symmetric", [False, True])
@torch.no_grad()
def test_the_step_of_the_input_is_learned_for_all_that_share_it(symmetric):
    """One token that is far larger than the others sets the scale; a smaller one is better for all together."""
    rows = tokens()
    rows[5] *= 8
    weights, forms = [random(16, WIDTH, seed=3), random(8, WIDTH, seed=4)], [Format(4), Format(3)]
    rounding = static_rounding(rows, 4, symmetric)
    scale = rounding.get_parameter("scale").clone()
    total = lambda made: sum(errors(w, q, rows, rounding).sum() for w, q in zip(weights, made, strict=True))
    before = total([quantize(weight, form) for weight, form in zip(weights, forms, strict=True)])
    made = adaquant(weights, forms, rows, rounding, SHORT)
    assert total(made) < 0.9 * before
    assert rounding.get_parameter("scale") != scale
    learned = float(total(made))
    rounding.get_parameter("scale").data = scale
    assert learned < total(made)  # the weights alone do less


@torch.no_grad()
def test_the_inputs_of_a_token_are_rounded_before_its_loss():
    rows, weight = tokens(), random(16, WIDTH, seed=3)
    rounding = Round({"bits": 2, "symmetric": True, "granularity": "channel", "scale_dtype": "float32"})
    [aware], [unaware] = (adaquant([weight], [Format(4)], rows, step, SHORT) for step in (rounding, None))
    assert errors(weight, aware, rows, rounding).sum() < errors(weight, unaware, rows, rounding).sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradients_are_those_of_the_straight_through_estimator(bits):
    """Rounding written as x + (round(x) − x) with the second part held, which autograd differentiates."""
    x = (3 * random(5, 9)).requires_grad_()
    scale, zero = (random(5, 1, seed=1).abs() + 0.1).requires_grad_(), torch.tensor([[0.0], [1], [2], [3], [1]])
    steps = x / scale
    codes = (steps + (steps.round() - steps).detach() + zero).clamp(0, 2**bits - 1)
    expected = (codes - zero) * scale
    found = RoundToSteps.apply(x, scale, zero, bits)
    torch.testing.assert_close(found, expected)
    g = random(5, 9, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, scale), g), torch.autograd.grad(expected, (x, scale), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", [FORMS[0], *FORMS[2:4]], ids=lambda form: form.name)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, WIDTH),
        torch.full((4, WIDTH), 7.0),
        1e-9 * random(4, WIDTH),
        torch.cat([torch.full((4, 1), 1e4), 0.01 * random(4, WIDTH - 1)], dim=1),
        torch.outer(random(4), random(WIDTH)),
        random(4, 1),
        random(1, WIDTH),
    ],
    ids=["zeros", "constant", "tiny", "outlier", "rank 1", "one input", "one output"],
)
@torch.no_grad()
def test_odd_weights_and_inputs_stay_finite_and_are_not_worse(weight, form):
    rows = tokens(weight.shape[1], 32)
    dead = rows.clone()
    dead[:, 0] = 0.0
    for given in (rows, dead, 1e4 * rows, torch.zeros_like(rows), rows[:1]):
        for rounding in (None, static_rounding(given, 8)):
            nearest = errors(weight, quantize(weight, form), given, rounding).sum()
            [learned] = adaquant([weight], [form], given, rounding, replace(SHORT, steps=8))
            assert torch.isfinite(learned.dequantize()).all()
            assert errors(weight, learned, given, rounding).sum() <= nearest * (1 + 1e-5)


def test_what_is_not_finite_raises():
    weight, rows = random(2, 3), random(4, 3)
    for broken in ((weight / 0, rows), (weight, rows * math.nan)):
        with pytest.raises(FloatingPointError, match="not finite"):
            adaquant([broken[0]], [Format(4)], broken[1], None, SHORT)


def test_only_integer_grids_have_a_step_to_learn(lab):
    with pytest.raises(ValueError, match="choose integer"):
        AdaQuant(1, 1, 0.1, 0.1, 0.1).check(Format(4, "nf4"))
    with pytest.raises(UserError, match="choose integer"):
        lab.cells("quantization=nf4", "quantization/method=adaquant")
    with pytest.raises(UserError, match="steps=0"):
        lab.cells("quantization=adaquant", "quantization.method.steps=0")


@torch.no_grad()
def test_outputs_of_the_unquantized_model_are_met_where_they_are_wanted():
    weight, exact = random(24, WIDTH, seed=3), tokens()
    rows = 0.8 * exact  # as if the layers before had shrunk everything
    errors = []
    for wanted in (None, exact):
        [found] = adaquant([weight], [Format(4)], rows, None, replace(SHORT, steps=100, scale_rate=0.03), wanted)
        errors.append((rows @ found.dequantize().T - exact @ weight.T).square().sum())
    assert errors[1] < 0.75 * errors[0]


def test_sequential_adaquant_wants_the_outputs_of_the_unquantized_model(lab, checkpoints, monkeypatch):
    given: list[Inputs] = []
    learn = AdaQuant.quantize_together

    def note(self, weights, forms, inputs):
        given.append(inputs)
        return learn(self, weights, forms, inputs)

    monkeypatch.setattr(AdaQuant, "quantize_together", note)
    overrides = ["quantization=adaquant_sequential", "quantization.weights.bits=2", "quantization.method.steps=1"]
    [cell] = lab.cells(f"model.path={checkpoints['llama']}", "method=dense", *overrides)
    context = Context(cell, Record(cell, None), torch.device("cpu"))
    context.__dict__["model"] = model = load_lively(checkpoints["llama"], 3.0, 0.0)
    expected: list[Tensor] = []
    hooks = [
        block.get_submodule(group[0]).register_forward_pre_hook(lambda _, args: expected.append(args[0]))
        for block in blocks_of(model, context.tower)
        for group in context.tower.inputs
    ]
    with torch.no_grad():
        model(context.calibration_ids)
    for hook in hooks:
        hook.remove()
    quantize_model(context, cell.compressions["quantization"])
    assert len(given) == len(expected) == 12
    for inputs, rows in zip(given, expected, strict=True):
        torch.testing.assert_close(inputs.exact_rows, rows.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(given[0].rows, given[0].exact_rows)
    assert (given[-1].rows - given[-1].exact_rows).norm() > 0.1 * given[-1].rows.norm()


def test_the_targets_of_sequential_adaquant_need_quantized_inputs(lab):
    with pytest.raises(UserError, match="sequential=false"):
        lab.cells("quantization=adaquant_sequential", "quantization.sequential=false")


def test_a_checkpoint_is_the_model_in_memory(lab):
    overrides = ["method=svdllm", "grouping=qkv", "ratio=0.8"]
    overrides += ["quantization=adaquant", "quantization/activations=int8_static"]
    made = lab.run(*overrides, "quantization.method.steps=10", "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
    nearest = lab.run(*overrides, "quantization/method=rtn")
    assert nearest["metrics"]["ppl"]["value"] != made["metrics"]["ppl"]["value"]
    assert nearest["sizes"]["bytes"] == made["sizes"]["bytes"]
