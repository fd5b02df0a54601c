"""Every preset of conf/quantization and every option of its groups: composed, run, saved and loaded again.

What each option computes is tested beside it. Here: that it runs on dense linears and on factors of every family,
that nothing becomes a NaN where weights or inputs are odd, that what is loaded is what was saved, and that a model
in 8 bits says what it said.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.cells.cell import Cell
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.models.load import load_model
from lowrank_lab.models.tiny import CONFIGS
from lowrank_lab.modules.quantized import QuantizedLinear
from lowrank_lab.quantization.base import Quantization
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context, pick_device

from .conftest import REPOSITORY, Lab, load_lively

CONF = REPOSITORY / "conf" / "quantization"
PRESETS = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "none")
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
METHODS = {
    "dense": ["method=dense"],
    # Ranks below that of the calibration text, some 25 letters: beyond it latents are noise, which may be blown up.
    "svdllm": ["method=svdllm", "ratio=0.6"],
    "rank 1": ["method=svdllm", "ratio=0.064"],
}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if file.stem != "none")


def needs(*names: str) -> None:
    """Skip the test where a library that an option needs is not installed."""
    if any(name.startswith("bnb") for name in names) and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("make test-libraries installs bitsandbytes")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, data_root) -> Lab:
    """One for all tests here: what they calibrate and decompose is made once."""
    return Lab(tmp_path_factory.mktemp("presets") / "results", data_root)


@pytest.fixture(scope="module")
def lively(tmp_path_factory, checkpoints) -> dict[str, Path]:
    """Checkpoints of every family whose blocks matter to their logits, so that an error in one is seen there."""
    return {
        family: saved(tmp_path_factory, load_lively(path, 4.0, 0.1), path) for family, path in checkpoints.items()
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory, checkpoints) -> Path:
    """A LLaMA with what is hard to divide by: inputs that are always zero or large, weights that are zero, alike
    or far from the others."""
    model = load_lively(checkpoints["llama"], 4.0, 0.0)
    block = model.model.layers[1]
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0.0
        block.post_attention_layernorm.weight[3] = 0.0
        block.post_attention_layernorm.weight[5] = 100.0
        block.mlp.up_proj.weight[7] = 0.0
        block.mlp.down_proj.weight[:, 11] = 0.0
        block.self_attn.o_proj.weight[2] = 0.25
        block.self_attn.v_proj.weight[4, 9] = 1e4
        model.model.layers[2].mlp.gate_proj.weight.zero_()
    return saved(tmp_path_factory, model, checkpoints["llama"])


def saved(tmp_path_factory, model, tokenizer_from: Path) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for file in tokenizer_from.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    return folder


# Searches cut short: by their class, settings that take less time than the defaults.
SHORTER = {
    "DuQuant": {"steps": 8},
    "SpinQuant": {"steps": 2},
    "AdaQuant": {"steps": 20},
    "SequentialAdaQuant": {"steps": 20},
    "Awq": {"points": 5},
    "BetaSplit": {"betas": [0.3, 0.5]},
    "KMeans": {"iterations": 5},
}


@cache
def composed(lab: Lab, *overrides: str) -> DictConfig:
    [cell] = lab.cells(*overrides)
    return cell.cfg


def made(lab: Lab, model: Path, method: str, *quantization: str) -> tuple[Context, dict[str, int | None]]:
    """A context with its model compressed and quantized, and the ranks."""
    cfg = composed(lab, *METHODS[method]).copy()
    cfg.model.path = str(model)
    if quantization:
        cfg.quantization = composed(lab, "method=dense", *quantization).quantization
        for part in (cfg.quantization.transform, cfg.quantization.latent, cfg.quantization.method):
            if part is not None:
                part.update(SHORTER.get(part._target_.rpartition(".")[2], {}))
    cfg.compressions.quantization = cfg.quantization
    cell = Cell.from_config(cfg)
    context = Context(cell, Record(cell, None), pick_device("cpu"))
    ranks = dict.fromkeys(context.sites)
    for name, compression in cell.compressions.items():
        compression.check(context)
        plan = compression.plan(context)
        ranks = plan if name == "lowrank" else ranks
        compression.apply(context, plan)
    return context, ranks


@torch.no_grad()
def logits(context: Context, model: nn.Module) -> torch.Tensor:
    """On part of the calibration text."""
    return model(context.calibration_ids[:4]).logits


def perplexity(context: Context, found: torch.Tensor) -> float:
    return math.exp(
        nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), context.calibration_ids[:4, 1:].flatten())
    )


def fewest_bits(quantization: Quantization) -> int:
    forms = [quantization.weights] if quantization.method is not None else []
    forms += [part.form for part in (quantization.activations, quantization.kv_cache) if part is not None]
    return min(form.bits for form in forms)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def plain(shared, lively) -> Callable[[str, str], torch.Tensor]:
    """The logits of a family under a method before it is quantized."""

    @cache
    def of(family: str, method: str) -> torch.Tensor:
        context, _ = made(shared, lively[family], method)
        return logits(context, context.model)

    return of


def in_turn(methods: tuple[str, str]) -> list[Any]:
    """Every preset with one of both methods; with the other it is slow."""
    return [
        pytest.param(preset, method, marks=pytest.mark.slow if (first + second) % 2 else ())
        for first, preset in enumerate(PRESETS)
        for second, method in enumerate(methods)
    ]


@pytest.mark.parametrize(("preset", "method"), in_turn(("dense", "svdllm")))
def test_a_preset_runs_and_comes_back_as_it_was(shared, lively, plain, tmp_path, preset, method):
    needs(preset)
    context, ranks = made(shared, lively["llama"], method, f"quantization={preset}")
    quantization, found = context.cell.compressions["quantization"], logits(context, context.model)
    away = distance(found, plain("llama", method))
    assert math.isfinite(perplexity(context, found))
    assert 0 < away < (0.05 if fewest_bits(quantization) == 8 else 0.8)
    linears = [module for module in context.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == (0 if quantization.method is None else 42 if method == "svdllm" else 21)
    description = checkpoint.describe(context.model, context.sites, ranks, preset, context.ratio)
    checkpoint.save(tmp_path, context.model, context.tokenizer, True, description)
    assert torch.equal(logits(context, load_model(str(tmp_path), None, "float32", False)), found)


@pytest.mark.parametrize(("preset", "method"), in_turn(("rank 1", "dense")))
def test_a_preset_makes_no_nan_of_odd_weights(shared, odd, preset, method):
    needs(preset)
    context, ranks = made(shared, odd, method, f"quantization={preset}")
    assert set(ranks.values()) == ({None} if method == "dense" else {1})
    for name, tensor in context.model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    assert math.isfinite(perplexity(context, logits(context, context.model)))


# Rotations of the residual stream are not for every family: they come last, so that nothing else is skipped too.
TRANSFORMS = sorted(options("transform"), key=lambda name: name in ("quarot", "spinquant"))
CACHES = [name for name in options("kv_cache") if name == "int8" or "rotated" in name]  # the others have fewer bits
TOGETHER = list(zip_longest(TRANSFORMS, options("latent"), CACHES, fillvalue="none"))


# Families with plain linears, with biases, transposed and fused ones are quick, each with some of the parts.
QUICK = ("llama", "opt", "gpt2", "phi3")
PARTS_OF_FAMILIES = [
    pytest.param(
        family,
        parts,
        id="-".join([family, *parts]),
        marks=() if family in QUICK and (QUICK.index(family) + second) % 2 == 0 else pytest.mark.slow,
    )
    for family in CONFIGS
    for second, parts in enumerate(TOGETHER)
]


@pytest.mark.parametrize(("family", "parts"), PARTS_OF_FAMILIES)
def test_every_family_in_8_bits_says_what_it_said(shared, lively, plain, family, parts):
    """Under each transform, latent and cache, several at once."""
    transform, latent, kv_cache = parts
    settings = ["quantization=w8a8", f"quantization/transform={transform}"]
    chosen = [f"quantization/latent={latent}", f"quantization/kv_cache={kv_cache}"]
    chosen += ["quantization.kv_cache.bits=8"] if kv_cache != "none" else []
    try:
        context, _ = made(shared, lively[family], "svdllm", *settings, *chosen)
    except SkippedCell as reason:
        pytest.skip(str(reason))
    away = distance(logits(context, context.model), plain(family, "svdllm"))
    assert 0 < away < 0.05


@pytest.mark.parametrize("kv_cache", options("kv_cache"))
def test_every_cache_runs(shared, lively, plain, kv_cache):
    context, _ = made(shared, lively["llama"], "dense", "quantization=int8", f"quantization/kv_cache={kv_cache}")
    away = distance(logits(context, context.model), plain("llama", "dense"))
    assert 0 < away < (0.05 if fewest_bits(context.cell.compressions["quantization"]) == 8 else 0.8)


# What a method needs of the format beside the bits.
FORMATS = {"bnb": ["quantization=bnb4"], "kmeans": ["quantization=kmeans"]}


# Each method with one of both kinds of activations; with the other it is slow.
PAIRS = [
    pytest.param(method, activations, marks=pytest.mark.slow if (first + second) % 2 else ())
    for first, method in enumerate(options("method"))
    for second, activations in enumerate(("int4", "int8_static"))
]


@pytest.mark.parametrize(("method", "activations"), PAIRS)
def test_every_method_with_every_kind_of_activations(shared, lively, plain, method, activations):
    needs(method)
    settings = FORMATS.get(method, ["quantization=int4"])
    chosen = [f"quantization/method={method}", f"quantization/activations={activations}"]
    context, _ = made(shared, lively["llama"], "svdllm", *settings, *chosen)
    away = distance(logits(context, context.model), plain("llama", "svdllm"))
    assert 0 < away < 0.8


def test_a_missing_library_stops_before_work(shared, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for preset in ("bnb4", "bnb8"):
        with pytest.raises(UserError, match=r"pip install 'lowrank_lab\[quantization\]'"):
            shared.cells("method=dense", f"quantization={preset}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("quantization.weights.bits=6", "bits"),
        ("quantization.weights.granularity=48", "blocks of 32, 64"),
        ("quantization.weights.granularity=channel", "blocks of 32, 64"),
        ("quantization.weights.scale_dtype=float16", "float32"),
        ("quantization.weights.grid=integer", "cannot make INT4 g64"),
    ],
)
def test_what_bitsandbytes_cannot_do_stops_before_work(shared, overrides, message):
    with pytest.raises(UserError, match=message):
        shared.cells("method=dense", "quantization=bnb4", overrides)
