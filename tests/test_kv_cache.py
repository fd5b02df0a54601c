"""The KV cache in few bits: attention to rounded keys and values, in every architecture, decoding or not."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.models import tiny
from lowrank_lab.models.families import kv_cache_shape
from lowrank_lab.modules.attention import RoundedCache, cache_of, round_cache
from lowrank_lab.modules.cache_format import CacheFormat
from lowrank_lab.modules.steps import Round

from .conftest import load_lively

IDS = torch.tensor([[1, 80, 97, 120, 33, 55, 200, 41] * 4, [1, 8, 9, 12, 3, 5, 20, 1] * 4])


def kv(bits: int, rotate: bool = False, symmetric: bool = False, granularity: Any = "head") -> CacheFormat:
    return CacheFormat(bits, symmetric, granularity, rotate, "float16")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def model(request, checkpoints) -> Any:
    """One of each family, whose attention matters."""
    return load_lively(checkpoints[request.param], 3.0, 0.1)


@torch.no_grad()
def logits(model: Any, **rest: Any) -> torch.Tensor:
    return model(IDS, **rest).logits


@torch.no_grad()
def decoded(model: Any) -> torch.Tensor:
    """The logits token by token, out of the cache."""
    cache, found = None, []
    for position in range(IDS.shape[1]):
        output = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def rounding_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "forward", lambda self, x: x)


@pytest.mark.parametrize(("own", "rotate"), [("sdpa", False), ("eager", True)])
def test_without_rounding_the_numbers_are_the_models_own(model, monkeypatch, own, rotate):
    """Soft capping, sliding windows, grouped queries and scales of logits among them; the rotation changes none."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation(own)
    changed = copy.deepcopy(plain)
    round_cache(changed, kv(2, rotate))
    rounding_nothing(monkeypatch)
    torch.testing.assert_close(logits(changed), logits(plain), rtol=1e-5, atol=1e-5 if not rotate else 1e-4)
    torch.testing.assert_close(decoded(changed), decoded(plain), rtol=1e-5, atol=1e-5 if not rotate else 1e-4)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0  # padding on the left, as in a batch of prompts
    both = [logits(m, attention_mask=mask)[:, 5:] for m in (changed, plain)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5 if not rotate else 1e-4)


def test_few_bits_change_the_logits_and_eight_hardly(model):
    expected = logits(model)
    errors = []
    for bits in (8, 4, 2):
        changed = copy.deepcopy(model)
        round_cache(changed, kv(bits))
        errors.append(float((logits(changed) - expected).norm() / expected.norm()))
    assert 0 < errors[0] < 0.02
    assert 8 * errors[0] < errors[1] < errors[2]  # a step of 4 bits is 17 times as long as one of 8
    assert errors[2] > 0.05


@pytest.mark.parametrize("rotate", [False, True])
def test_a_whole_text_sees_what_decoding_sees(model, rotate):
    changed = copy.deepcopy(model)
    round_cache(changed, kv(4, rotate))
    torch.testing.assert_close(decoded(changed), logits(changed), rtol=1e-3, atol=1e-3)


def test_models_in_one_process_differ(model):
    expected = logits(model)
    changed = copy.deepcopy(model)
    round_cache(changed, kv(2))
    other = copy.deepcopy(model)
    round_cache(other, kv(3))
    first, second = logits(changed), logits(other)
    assert not torch.equal(first, second)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(changed), first)
    assert cache_of(model) is None and cache_of(changed) == kv(2) and cache_of(other) == kv(3)


def test_what_attention_is_given():
    """Each token and head is rounded by itself; queries are not, and keys come back rotated with them."""
    query, key, value = random(2, 4, 5, 16), random(2, 2, 5, 16, seed=1), random(2, 2, 5, 16, seed=2)
    key[0, 0, 0, 0] = 1e4
    same, *rounded = RoundedCache(kv(4, granularity=8), 16)(query, key, value)
    assert torch.equal(same, query)
    for x, found in zip((key, value), rounded, strict=True):
        groups = x.view(2, 2, 5, 2, 8)
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
        error = (found - x).view(2, 2, 5, 2, 8).abs().amax(-1)
        assert (error <= step * 0.51).all()
    query, rotated, _ = RoundedCache(kv(8, rotate=True), 16)(query, key, value)
    products = query @ rotated.repeat_interleave(2, 1).mT
    expected = same @ key.repeat_interleave(2, 1).mT
    assert (products - expected).abs().max() < 0.02 * expected.abs().max()
    assert rotated[0, 0, 0].abs().max() < 0.3e4  # an outlier is spread over the head


@pytest.mark.parametrize("x", [0.0, 7.0, 1e-9, 1e4], ids=["zeros", "constant", "tiny", "large"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_keys_stay_finite(x, symmetric):
    key = torch.full((1, 1, 3, 1), x)  # heads of one channel
    for found in RoundedCache(kv(2, rotate=True, symmetric=symmetric), 1)(key, key, key):
        assert torch.isfinite(found).all()
        assert (found.abs() <= 1.5 * abs(x) + 1e-6).all()


def test_keys_that_are_not_finite_are_not_rounded_to_something_that_is():
    changed = Round({"bits": 4, "scale_dtype": "float16"})
    x = random(3, 8)
    x[1, 2] = math.nan
    assert torch.isnan(changed(x)[1]).all()
    assert torch.isfinite(changed(x)[[0, 2]]).all()


def test_an_outlier_of_the_keys_costs_less_when_it_is_rotated():
    """The product of queries and keys, one of whose channels is far larger than the others."""
    query, key = random(1, 4, 30, 64), random(1, 4, 30, 64, seed=1)
    key[..., 5] *= 30
    query[..., 5] /= 30
    error = {}
    for rotate in (False, True):
        its_query, its_key, _ = RoundedCache(kv(4, rotate), 64)(query, key, key)
        error[rotate] = float((its_query @ its_key.mT - query @ key.mT).norm())
    assert error[True] < 0.6 * error[False]


def test_other_kinds_of_attention_are_skipped(model):
    changed = copy.deepcopy(model)
    round_cache(changed, kv(4))
    with pytest.raises(SkippedCell, match="lowrank_lab_sdpa"):
        round_cache(changed, kv(4))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_checkpoint_rounds_its_cache(lab, checkpoints, family):
    made = lab.run(f"model.path=tiny:{family}", "method=dense", "quantization=kv4", "save=true")
    folder = lab.root / made["checkpoint"]
    config = json.loads((folder / "config.json").read_text())
    assert "lowrank_lab_" not in json.dumps(config)  # no name that a reader without us would look up
    assert config["quantization_config"]["kv_cache"]["bits"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert cache_of(loaded) == kv(4)
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert cache_of(AutoModel.from_pretrained(folder)) == kv(4)
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert cache_of(eager) == kv(4)
    again = lab.run(f"model.path={folder}")
    assert again["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert again["sizes"]["kv_cache_bytes_per_token"] == made["sizes"]["kv_cache_bytes_per_token"]
    with pytest.raises(UserError, match="quantized already"):
        lab.cells(f"model.path={folder}", "quantization=int4")
    with pytest.raises(UserError, match="dense weights cannot hold"):
        loaded.dequantize()


def test_a_cell_with_everything_rounded(lab):
    overrides = ("method=svdllm", "grouping=qkv", "quantization=w8a8", "quantization/kv_cache=int8")
    record = lab.run(*overrides, "eval=ppl,generation,speed", *SMALL_GENERATION, *SMALL_SPEED, "save=true")
    loaded = lab.run(f"model.path={lab.root / record['checkpoint']}")
    assert loaded["method"] == "svdllm INT8 sym A8 KV8"
    assert loaded["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]


SMALL_GENERATION = [
    "eval.generation.max_new_tokens=4",
    "eval.generation.prompts={zero_shot: [Why?], few_shot: {shots: [], questions: []}}",
]
SMALL_SPEED = [
    "eval.speed.batch_sizes=[1]",
    "eval.speed.seqlens=[8]",
    "eval.speed.new_tokens=1",
    "eval.speed.repeats=1",
]


@pytest.mark.slow
def test_the_speed_of_a_rotated_cache_counts_no_product_twice(lab):
    rotated = ("quantization=kv4", "quantization.kv_cache.rotate=true")
    record = lab.run("method=dense", *rotated, "eval=ppl,speed", *SMALL_SPEED)
    macs = record["metrics"]["speed"]["macs"]
    assert macs["model"]["linears"] == macs["dense"]["linears"]
    layers, width = 3, 12  # heads of 12 are transformed by one matrix: four of queries, two of keys and nine cached
    assert macs["model"]["steps"] == layers * (4 + 2 * 9) * width**2
    assert macs["model"]["attention"] == macs["dense"]["attention"]


@pytest.mark.parametrize(
    ("cache", "per_head"),
    [
        (kv(8), 16 + 2 + 1),
        (kv(4), 8 + 2 + 0.5),
        (kv(4, symmetric=True), 8 + 2),
        (kv(2, granularity=8), 4 + 2 * 2 + 2 * 0.25),
        (CacheFormat(4, True, "head", False, "float32"), 8 + 4),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_bytes_of_a_token_by_hand(cache, per_head):
    """Codes, a scale and a zero point: three layers, four heads of 16."""
    assert cache.bytes_per_token(3, 4, 16) == 2 * 3 * 4 * per_head


def test_bytes_of_a_token_are_those_of_packed_tensors(checkpoints):
    from lowrank_lab.modules.codec import pack, quantize

    model = load_lively(checkpoints["gemma2"], 1.0, 0.0)
    layers, heads, head_size = kv_cache_shape(model.config)
    for cache in (kv(3), kv(5, granularity=7)):
        quantized = quantize(random(heads, head_size), cache.form)  # the keys of one token in one layer
        assert quantized.zero is not None
        codes = pack(quantized.codes, cache.bits).numel()
        zeros = pack(quantized.zero.to(torch.uint8), cache.bits).numel()
        expected = 2 * layers * (codes + 2 * quantized.scale.numel() + zeros)
        assert cache.bytes_per_token(layers, heads, head_size) == expected


def test_labels_tell_caches_apart():
    caches = [kv(4), kv(4, rotate=True), kv(4, symmetric=True), kv(4, granularity=8), kv(2)]
    assert [cache.label for cache in caches] == ["KV4", "KV4 rotated", "KV4 sym", "KV4 g8", "KV2"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("bits=1", "bits"), ("granularity=tensor", "granularity"), ("rotate=1", "rotate"), ("symmetric=2", "true")],
)
def test_settings_out_of_range_are_rejected(lab, setting, message):
    with pytest.raises(UserError, match=message):
        lab.cells("method=dense", "quantization=kv4", f"quantization.kv_cache.{setting}")
