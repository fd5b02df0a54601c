"""The dtype of a model's own weights, of a cell's computation, and of the weights in its checkpoints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.checkpoints.casting import bytes_in
from lowrank_lab.models import origin, tiny
from lowrank_lab.models.load import load_model
from lowrank_lab.models.source import resolve

from . import gguf_files

IDS = torch.tensor([[1, 80, 97, 120, 33, 55, 200, 41]])


def source(path: Path, tmp_path: Path) -> Any:
    return resolve(str(path), None, Store(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Makes a tiny model with weights of a dtype; ``entries`` are set in its config.json, None removes one."""

    def make(weights: str = "float32", **entries: Any) -> Path:
        made = tmp_path / f"of-{weights}"
        made.mkdir()
        tiny.build("llama", made)
        model = load_model(str(made), None, weights, False)
        model.save_pretrained(made)
        config = json.loads((made / "config.json").read_text()) | entries
        (made / "config.json").write_text(
            json.dumps({n: value for n, value in config.items() if value is not None})
        )
        return made

    return make


@pytest.mark.parametrize(
    ("dtype", "entries", "own"),
    [
        ("bfloat16", {}, "bfloat16"),
        ("float16", {"dtype": None, "torch_dtype": "float16"}, "float16"),  # as it was called before
        ("bfloat16", {"dtype": None}, "bfloat16"),  # as its weights are
        ("bfloat16", {"dtype": None, "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ("float32", {"dtype": "float64"}, "float32"),  # which cells do not compute in
    ],
)
def test_the_own_dtype_of_a_folder(folder, tmp_path, dtype, entries, own):
    assert origin.dtype_of(source(folder(dtype, **entries), tmp_path)) == own


def coded(kind: writer.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """The weights of a tiny GGUF file, its matrices of this ggml type."""
    weights = gguf_files.tensors(len(gguf_files.vocabulary(["the"])["tokenizer.ggml.tokens"]))
    return {n: writer.quants.quantize(w, kind) if w.ndim > 1 else w for n, w in weights.items()}


@pytest.mark.parametrize(("kind", "own"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_the_own_dtype_of_a_gguf_file_is_that_of_most_weights(tmp_path, monkeypatch, kind, own):
    add = writer.GGUFWriter.add_tensor
    of_codes = lambda tensor: {"raw_dtype": writer.GGMLQuantizationType.Q8_0} if tensor.dtype == np.uint8 else {}
    monkeypatch.setattr(
        writer.GGUFWriter, "add_tensor", lambda self, name, tensor: add(self, name, tensor, **of_codes(tensor))
    )
    weights = coded(writer.GGMLQuantizationType[kind])
    found = source(gguf_files.write(tmp_path / "it.gguf", gguf_files.vocabulary(["the"]), weights), tmp_path)
    assert (origin.dtype_of(found), origin.format_of(found)) == (own, kind)
    assert origin.size_of(found) == (tmp_path / "it.gguf").stat().st_size


def test_auto_computes_in_the_own_dtype_under_its_name(lab, folder):
    model = f"model.path={folder('bfloat16')}"
    [auto], [named], [default] = (lab.cells(model, *more) for more in (["dtype=auto"], ["dtype=bfloat16"], []))
    assert (auto.cfg.dtype, auto.key, auto.label) == ("bfloat16", named.key, named.label)
    assert "dtype=bfloat16" in auto.label
    assert default.cfg.dtype == "float32" and default.key != auto.key
    assert lab.run(model, "dtype=auto", "method=svd")["config"]["dtype"] == "bfloat16"


def test_the_dtype_of_a_checkpoint_changes_no_key_and_is_noticed(lab, folder, caplog):
    caplog.set_level(logging.INFO)
    model = folder("bfloat16")
    run = lambda *more: lab.run(f"model.path={model}", "method=svd", "save=true", *more)
    own = run()
    assert own["checkpoint"].endswith("-bfloat16")
    size = (lab.root / own["checkpoint"] / "model.safetensors").stat().st_size
    source_size = (model / "model.safetensors").stat().st_size
    assert own["saved"] == {"checkpoint": {"dtype": "bfloat16", "bytes": size, "source_bytes": source_size}}
    [line] = [message for message in caplog.messages if message.startswith(f"checkpoint: {size / 1e6:.3g} MB")]
    assert line.startswith(
        f"checkpoint: {size / 1e6:.3g} MB in bfloat16, from {source_size / 1e6:.3g} MB (bfloat16)"
    )
    assert "save.dtype=float32 " in line and "save.dtype=float16 " in line
    assert run() == own
    other = run("save.dtype=float32")
    assert other["checkpoint"] == own["checkpoint"].removesuffix("-bfloat16")
    assert (other["key"], other["metrics"]) == (own["key"], own["metrics"])
    assert [stage["stage"] for stage in other["stages"] if not stage.get("reused", True)] == ["checkpoint"]
    assert run("save.dtype=float32") == other
    dtypes = {AutoModelForCausalLM.from_pretrained(lab.root / one["checkpoint"]).dtype for one in (own, other)}
    assert dtypes == {torch.bfloat16, torch.float32}
    merged = run("save.merge=true")  # beside the compressed one of the same dtype
    assert merged["merged_checkpoint"] == f"{own['checkpoint']}-merged"
    assert "dense weights are no smaller than the dense model's" in caplog.text


CELLS = {
    "factors": ("method=svd", "grouping=qkv"),
    "remapped": ("method=svd", "storage=remap", "grouping=qkv"),
    "pruned": ("method=svd", "pruning=magnitude", "sparsity=0.5"),
    "quantized": (
        "method=svd",
        "quantization=quarot",
        "quantization.weights.scale_dtype=float32",
        "quantization/kv_cache=int4_rotated",
    ),
    "static": ("method=dense", "quantization=smoothquant"),
}


# Each kind with one dtype in turn; with the other it is slow.
PAIRS = [
    pytest.param(what, dtype, marks=pytest.mark.slow if (first + second) % 2 else ())
    for first, what in enumerate(CELLS)
    for second, dtype in enumerate(("bfloat16", "float16"))
]


@pytest.mark.parametrize(("what", "dtype"), PAIRS)
def test_only_weights_are_cast(lab, what, dtype):
    run = lambda kept: lab.run(
        "ratio=0.5", "eval.ppl.max_windows=1", *CELLS[what], "save=true", f"save.dtype={kept}"
    )
    load = lambda record: AutoModelForCausalLM.from_pretrained(lab.root / record["checkpoint"])
    whole = load(run("float32"))
    record = run(dtype)
    cast = load(record)
    assert json.loads((lab.root / record["checkpoint"] / "config.json").read_text())["dtype"] == dtype
    fixed = 0
    for name, tensor in whole.named_parameters():
        found = cast.get_parameter(name)
        assert torch.equal(found, tensor.to(found.dtype)), name
        is_fixed = not tensor.is_floating_point() or name.split(".")[-1] in ("scale", "zero", "factor", "float16")
        assert found.dtype == (tensor.dtype if is_fixed else getattr(torch, dtype)), name
        fixed += is_fixed
    assert (fixed > 0) == (what != "factors")
    assert bytes_in(whole, whole.config.quantization_config.saved)[dtype] == sum(
        p.nbytes for p in cast.parameters()
    )
    again = AutoModelForCausalLM.from_pretrained(lab.root / record["checkpoint"], dtype=torch.float32)
    with torch.no_grad():
        expected = whole(IDS).logits
        for name, tensor in whole.named_parameters():
            tensor.copy_(cast.get_parameter(name))
        found = again(IDS).logits
        torch.testing.assert_close(found, whole(IDS).logits)
    if not whole.config.quantization_config.saved.online:  # else a value may be rounded to another code
        steps = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
        assert (found - expected).abs().max() < 4 * steps * expected.abs().max()


def test_the_model_in_memory_stays_as_it_is(folder, tmp_path):
    model = load_model(str(folder()), None, "float32", False)
    before, in_config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.dtype
    checkpoint.save(tmp_path / "saved", model, tiny.byte_tokenizer(), True, None, "bfloat16")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    assert model.config.dtype == in_config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16


def test_a_weight_that_float16_does_not_reach_is_named(folder, tmp_path):
    model = load_model(str(folder()), None, "float32", False)
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(UserError, match=r"save.dtype=float16: model\.norm\.weight has values too large for it"):
        checkpoint.save(tmp_path / "saved", model, tiny.byte_tokenizer(), True, None, "float16")
    assert model.model.norm.weight.dtype == torch.float32


def test_what_a_model_keeps_in_float32_stays_so(folder, tmp_path):
    model = load_model(str(folder()), None, "float32", False)
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    checkpoint.save(tmp_path / "saved", model, tiny.byte_tokenizer(), True, None, "bfloat16")
    header = origin.weight_files.tensors_in(tmp_path / "saved" / "model.safetensors")
    assert {name for name, dtype in header.items() if dtype == "F32"} == {
        f"model.layers.{block}.input_layernorm.weight" for block in range(len(model.model.layers))
    }


@pytest.mark.parametrize("override", ["save.dtype=int8", "save.dtype=null", "dtype=automatic"])
def test_other_dtypes_are_refused_before_any_work(lab, override):
    name = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{name}=\w+ is not valid; it must be .*auto"):
        lab.cells(override)
