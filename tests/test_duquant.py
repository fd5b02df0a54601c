"""DuQuant: the mathematics of its rotations and permutation, and models that compute what they did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import families, tiny
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.quantization.transform.duquant import (
    even_rotation,
    greedy_rotations,
    rotate,
    spread_outliers,
    spreading_blocks,
    zigzag,
)

from .conftest import load_lively
from .prepared import prepared_in


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(tokens: int, width: int) -> torch.Tensor:
    """Tokens with two channels far larger than the others."""
    x = random(tokens, width)
    x[:, width // 2] *= 40
    x[:, -1] *= 20
    return x


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_first_row_of_a_step_is_even_and_the_others_are_orthogonal_to_it(size):
    matrix = even_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix[0], torch.full((size,), size**-0.5, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_one_step_spreads_the_largest_channel_evenly():
    x = torch.zeros(3, 16)
    x[1, 5] = 8.0
    [rotation] = greedy_rotations(x.unsqueeze(0), steps=1, seed=0)
    torch.testing.assert_close((x.double() @ rotation)[1], torch.full((16,), 2.0, dtype=torch.float64))


def test_zigzag_by_hand():
    """Nine channels for three blocks: there, back, there."""
    magnitude = torch.tensor([1.0, 9.0, 5.0, 3.0, 8.0, 7.0, 2.0, 6.0, 4.0])
    order = zigzag(magnitude, 3)
    assert magnitude[order].view(3, 3).tolist() == [[9, 4, 3], [8, 5, 2], [7, 6, 1]]


def test_zigzag_fills_a_short_last_block_and_goes_on_with_the_others():
    magnitude = torch.arange(8.0, 0.0, -1.0)
    assert (zigzag(magnitude, 3) + 1).tolist() == [1, 6, 7, 2, 5, 8, 3, 4]


@pytest.mark.parametrize("width", [64, 100, 137])
def test_zigzag_makes_the_blocks_means_close(width):
    magnitude = random(width).abs()
    means = lambda order: torch.stack([block.mean() for block in magnitude[order].split(16)[: width // 16]])
    assert sorted(zigzag(magnitude, 16).tolist()) == list(range(width))
    assert means(zigzag(magnitude, 16)).std() < 0.3 * means(torch.arange(width)).std()


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 40])
def test_rotations_are_orthogonal_in_short_blocks_too(width):
    blocks = spreading_blocks(outliers(30, width), 16, steps=40, seed=0)
    eye = torch.eye(16, dtype=torch.float64).expand_as(blocks)
    torch.testing.assert_close(blocks @ blocks.mT, eye, rtol=0, atol=1e-12)
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(identity, blocks), blocks.mT), identity, rtol=0, atol=1e-12)


def test_more_steps_find_a_smaller_maximum_and_none_is_kept_where_it_is_larger():
    x = outliers(50, 32)
    x[:, :4] *= 30
    maxima = [(x.double() @ greedy_rotations(x.unsqueeze(0), steps, 0)[0]).abs().max() for steps in (0, 1, 8, 64)]
    assert maxima[0] == x.abs().max()
    assert maxima == sorted(maxima, reverse=True)
    assert maxima[3] < maxima[1] < 0.5 * maxima[0]
    even = torch.ones(1, 5, 8)  # any rotation that moves anything makes a value larger
    torch.testing.assert_close(greedy_rotations(even, 20, 0)[0], torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 31, 48, 100])
@pytest.mark.parametrize("case", ["outliers", "zeros", "dead channels", "one of 1e4", "dead weights"])
def test_the_product_stays_and_the_maximum_falls(width, case):
    x, weight = outliers(64, width), random(9, width, seed=1)
    if case == "zeros":
        x = torch.zeros_like(x)
    elif case == "dead channels":
        x[:, ::2] = 0.0
    elif case == "one of 1e4":
        x[3, 0] = 1e4
    elif case == "dead weights":
        weight[:, ::3] = 0.0
    spreading = spread_outliers(x, x.abs().amax(0), weight.abs().amax(0), 0.6, 32, steps=16, seed=0)
    after, changed = spreading.activations(x.double()), spreading.weight(weight.double())
    assert torch.isfinite(after).all() and torch.isfinite(changed).all()
    product = x.double() @ weight.double().T
    torch.testing.assert_close(after @ changed.T, product, rtol=1e-9, atol=1e-9 * float(product.abs().max()))
    smoothed = x / spreading.scale
    assert after.abs().max() <= smoothed.abs().max() * (1 + 1e-6)
    if width > 31 and case in ("outliers", "one of 1e4"):
        assert after.abs().max() < 0.5 * smoothed.abs().max() < 0.5 * x.abs().max()


def test_an_activation_that_is_not_finite_raises():
    x = outliers(4, 8)
    x[1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        spread_outliers(x, x.abs().amax(0), torch.ones(8), 0.6, 8, 4, 0)


FAMILIES = ("llama", "qwen2", "gpt2", "opt", "gemma2", "phi3")
IDS = torch.tensor([[1, 80, 97, 120, 33, 55, 200, 41]])
QUICK = ("quantization=duquant", "quantization.transform.steps=4", "quantization.transform.block_size=32")
ALONE = (*QUICK, "quantization/method=none", "quantization/activations=none")


@pytest.fixture(scope="module")
def lively(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Models whose blocks matter to their logits, with biases, and with outliers in the channels of every norm."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        model = load_lively(checkpoints[family], 3.0, 0.1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "norm" in name + ".ln_norm" and name.endswith("weight"):
                    parameter[7] = 25.0
        model.save_pretrained(folders[family])
        tiny.byte_tokenizer().save_pretrained(folders[family])
    return folders


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def checkpoint_of(lab, *overrides: str) -> Path:
    return lab.root / lab.run(*overrides, "save=true")["checkpoint"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_computes_what_it_did(lab, lively, family):
    made = checkpoint_of(lab, f"model.path={lively[family]}", "method=dense", *ALONE)
    expected = logits(lively[family])
    torch.testing.assert_close(logits(made), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "grouping"), [("llama", "qkv"), ("qwen2", "each"), ("gpt2", "each"), ("opt", "qkv")]
)
def test_a_factored_model_computes_what_it_did(lab, lively, family, grouping):
    model = (f"model.path={lively[family]}", "method=svdllm", f"grouping={grouping}", "ratio=0.8")
    expected = logits(checkpoint_of(lab, *model))
    made = checkpoint_of(lab, *model, *ALONE)
    torch.testing.assert_close(logits(made), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    loaded = AutoModelForCausalLM.from_pretrained(made)
    groups = [g for block in blocks_of(loaded, families.FAMILIES[family].tower) for g, _ in prepared_in(block)]
    assert not any(path.endswith(".left") for group in groups for path in group)  # latents cost nothing online


def test_in_four_bits_it_loses_less_than_rounding_alone(lab, lively):
    model = (f"model.path={lively['llama']}", "method=dense")
    expected = logits(lively["llama"])
    error = lambda *overrides: float((logits(checkpoint_of(lab, *model, *overrides)) - expected).norm())
    errors = [error(*QUICK, f"seed={seed}") for seed in range(3)]  # so small a model depends much on the draw
    alone = error("quantization=w4a4")
    assert max(errors) < alone
    assert sum(errors) / 3 < 0.75 * alone


def test_a_checkpoint_is_the_model_in_memory(lab, lively):
    made = lab.run(f"model.path={lively['qwen2']}", "method=svdllm", "grouping=qkv", *QUICK, "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
    assert loaded["method"] == "svdllm DuQuant INT4 A4"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_rotations_take_the_bytes_of_the_models_dtype_also_when_loaded(lab, dtype):
    made = lab.run("method=dense", *QUICK, f"dtype={dtype}", "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}", f"dtype={dtype}")
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
    assert loaded["metrics"]["ppl"]["value"] == pytest.approx(made["metrics"]["ppl"]["value"], rel=1e-6)


def test_a_linear_that_is_no_target_shares_the_input_but_not_the_rounding(lab, lively):
    overrides = ("method=dense", "targets=kv", "quantization/method=none")
    made = checkpoint_of(lab, f"model.path={lively['llama']}", *QUICK, *overrides)
    block = AutoModelForCausalLM.from_pretrained(made).model.layers[0]
    kinds = {path: [type(step).__name__ for step in steps] for group, steps in prepared_in(block) for path in group}
    spread = ["Rotate", "Permute", "Rotate"]
    assert kinds == {
        "self_attn.q_proj": spread,
        "self_attn.k_proj": [*spread, "Round"],
        "self_attn.v_proj": [*spread, "Round"],
    }


def test_latents_are_left_to_a_quantization_of_their_own(lab, lively):
    model = (f"model.path={lively['llama']}", "method=svdllm", "ratio=0.8")
    factors = {}
    for latent in ("none", "smooth"):
        made = checkpoint_of(lab, *model, *ALONE, f"quantization/latent={latent}", "calibration.samples=4")
        loaded = AutoModelForCausalLM.from_pretrained(made)
        factors[latent] = loaded.model.layers[0].self_attn.o_proj.left.weight
    plain = AutoModelForCausalLM.from_pretrained(checkpoint_of(lab, *model, "calibration.samples=4"))
    before = plain.model.layers[0].self_attn.o_proj.left.weight
    ratio = factors["smooth"] / before  # scaled by column, and no more
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
    assert not torch.allclose(factors["none"].abs().sum(0), before.abs().sum(0), rtol=0.01)


@pytest.mark.parametrize(
    ("setting", "message"), [("alpha=2", "alpha"), ("block_size=0", "block_size"), ("steps=-1", "steps")]
)
def test_settings_out_of_range_are_rejected(lab, setting, message):
    with pytest.raises(UserError, match=message):
        lab.cells("method=dense", "quantization=duquant", f"quantization.transform.{setting}")
