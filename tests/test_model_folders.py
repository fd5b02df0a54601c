"""Model folders that are damaged, incomplete or not what they seem: one line before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import tiny
from lowrank_lab.models.folder_check import check_snapshot
from lowrank_lab.models.load import check_model, load_model
from lowrank_lab.models.source import resolve

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WEIGHTS, SECOND = "model.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def in_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: SECOND if ".2." in name else SECOND.replace("2", "1", 1) for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def one_line(look: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        look()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


# Weights that are not those of the model

DIFFERENCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "renamed": (
        lambda folder: rewrite(folder, renamed("q_proj.weight", "q_proj.base_layer.weight")),
        r"3 missing \(model\.layers\.0\.self_attn\.q_proj\.weight, .*; 3 unknown \(model\.layers\.0.*base_layer",
    ),
    "prefixed": (
        lambda folder: rewrite(folder, renamed("model.", "module.model.")),
        r"30 missing \(lm_head\.weight",
    ),
    "prefixed, in a pickle": (
        lambda folder: (rewrite(folder, renamed("model.", "module.model.")), in_bin(folder)),
        r"29 unknown \(module\.model\.embed_tokens",
    ),
    "a classifier": (
        lambda folder: rewrite(folder, lambda tensors: {**tensors, "score.weight": torch.ones(2, 48)}),
        r"1 unknown \(score\.weight\)",
    ),
    "of another size": (
        lambda folder: rewrite(
            folder, lambda tensors: {k: v[1:] if "1.mlp.up_proj" in k else v for k, v in tensors.items()}
        ),
        r"1 of other sizes \(model\.layers\.1\.mlp\.up_proj\.weight \(79, 48\) instead of \(80, 48\)\)",
    ),
    "too few layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=4),
        r"9 missing \(model\.layers\.3",
    ),
    "too many layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=2),
        r"9 unknown \(model\.layers\.2",
    ),
    "of another family": (
        lambda folder: change(folder / "config.json", model_type="opt"),
        "not those of a OPTForCausalLM",
    ),
    "another hidden size": (lambda folder: change(folder / "config.json", hidden_size=64), r"29 of other sizes"),
    "heads": (lambda folder: change(folder / "config.json", num_attention_heads=5), "cannot read its config.json"),
    "no family": (lambda folder: change(folder / "config.json", model_type="none"), "model type `none`"),
    "no dtype": (lambda folder: change(folder / "config.json", dtype="none"), "cannot read its"),
    "no tokenizer": (
        lambda folder: change(folder / "tokenizer.json", model={"type": "none", "vocab": {}}),
        "cannot read its tokenizer",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_weights_that_are_not_those_of_the_model(model, damage, message):
    damage(model)
    one_line(lambda: check_model(str(model), None, False), message)


def test_nothing_runs_with_weights_that_are_missing(lab, model):
    """Not in a grid, whose other model is whole, nor where the weights are only looked at when they are loaded."""
    rewrite(model, renamed("v_proj", "value"))
    done = lab.cli("-m", "method=dense,svdllm", f"model.path={model},tiny:llama", check=False)
    assert done.returncode == 1
    assert "3 missing (model.layers.0.self_attn.v_proj.weight" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "starting" not in done.stderr
    assert not (lab.root / "records").exists() and not (lab.root / "grids").exists()
    one_line(lambda: lab.run("method=svdllm", f"model.path={model}"), "3 missing")
    assert lab.results.records() == []


@pytest.mark.parametrize("family", tiny.ALL_CONFIGS)
def test_what_a_family_leaves_out_is_not_missing(family, tmp_path):
    """Also where weights are saved without lm_head, which must then be tied, and with buffers of old versions."""
    tiny.build(family, tmp_path / "whole")
    whole: Any = load_model(str(tmp_path / "whole"), None, "bfloat16", False)
    whole.base_model.save_pretrained(tmp_path / "base")
    if not whole.config.tie_word_embeddings:
        one_line(
            lambda: load_model(str(tmp_path / "base"), None, "bfloat16", False), r"1 missing \(lm_head\.weight\)"
        )
        return
    old = {f"h.0.attn.{name}": torch.ones(2) for name in ("masked_bias", "rotary_emb.inv_freq")}
    rewrite(tmp_path / "base", lambda tensors: {**tensors, **old})
    loaded = load_model(str(tmp_path / "base"), None, "bfloat16", False).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.state_dict().items())


# Files that are damaged or not there

FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (
        lambda f: (in_shards(f), (f / SECOND).unlink()),
        f"{INDEX} names {SECOND}, which is missing",
    ),
    "a shard is cut": (
        lambda f: (in_shards(f), halve(f / SECOND)),
        rf"{SECOND} has \d+ bytes where its header says",
    ),
    "a shard lacks a tensor": (
        lambda f: (in_shards(f), save_file({"x": torch.ones(1)}, f / SECOND)),
        rf"{INDEX} says that {SECOND} has model\.layers\.2",
    ),
    "an index of nothing": (lambda f: (in_shards(f), (f / INDEX).write_text("{}")), f"{INDEX} has no weight_map"),
    "no index": (lambda f: (in_shards(f), (f / INDEX).unlink()), "must have a name that transformers reads"),
    "cut": (lambda f: halve(f / WEIGHTS), f"{WEIGHTS} has .* it is not complete"),
    "cut in the header": (
        lambda f: (f / WEIGHTS).write_bytes(b"\x40" + bytes(9)),
        f"{WEIGHTS} ends within its header",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is empty"),
    "a page of errors": (
        lambda f: (f / WEIGHTS).write_text("<html>no such page"),
        f"{WEIGHTS} is not a safetensors file",
    ),
    "a pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), f"{WEIGHTS} is a pointer of Git LFS"),
    "a cut pickle": (
        lambda f: (in_bin(f), halve(f / "pytorch_model.bin")),
        "pytorch_model.bin is not a complete file",
    ),
    "a link to nothing": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to(f / "none")),
        f"{WEIGHTS} is a link to a file that is not there",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no .safetensors or .bin weights"),
    "a download": (lambda f: (f / WEIGHTS).rename(f / f"{WEIGHTS}.incomplete"), "the download is not complete"),
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "config: nothing": (lambda f: (f / "config.json").write_text(""), "config.json is empty"),
    "config: no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config: deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "config: a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
    "config: a pointer": (lambda f: (f / "config.json").write_text(POINTER), "config.json is a pointer of Git LFS"),
    "config: heads": (
        lambda f: change(f / "config.json", num_key_value_heads=3),
        "num_attention_heads=4 is no multiple of num_key_value_heads=3",
    ),
    "config: no family": (lambda f: (f / "config.json").write_text("{}"), "no model_type"),
    "generation: no JSON": (
        lambda f: (f / "generation_config.json").write_text("x"),
        "generation_config.json is not",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the folder has no tokenizer"),
    "tokenizer: cut": (lambda f: halve(f / "tokenizer.json"), "tokenizer.json is not JSON"),
    "tokenizer: a pointer": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_text(POINTER)),
        "tokenizer.model is a pointer of Git LFS",
    ),
    "tokenizer: no tokens": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json has no vocabulary"),
    "tokenizer: of another": (
        lambda f: change(f / "config.json", vocab_size=259),
        "has 260 tokens, but the model only 259",
    ),
    "nothing": (lambda f: (shutil.rmtree(f), f.mkdir()), "the folder has no config.json"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "that is a file; give the folder of the model"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_files_that_are_damaged_or_missing(model, damage, message):
    damage(model)
    one_line(lambda: resolve(str(model), None, Store(model.parent / "store")), message)


@pytest.mark.parametrize("keep", [in_shards, in_bin])
def test_weights_are_read_from_every_kind_of_file(model, keep):
    expected = load_model(str(model), None, "float32", False).state_dict()
    keep(model)
    (model / "other.incomplete").write_text("")
    resolve(str(model), None, Store(model.parent / "store"))
    found = load_model(str(model), None, "float32", False).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Adapters, and weights that another tool has quantized


def test_an_adapter_is_not_taken_for_the_model(model):
    """Neither beside the model, into which transformers would load it unasked, nor alone."""
    from peft import LoraConfig, get_peft_model

    base = load_model(str(model), None, "float32", False)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(model))
    look = lambda: resolve(str(model), None, Store(model.parent / "store"))
    one_line(look, "an adapter lies beside the model")
    one_line(lambda: load_model(str(model), None, "float32", False), "an adapter lies beside the model: merge it")
    for name in (WEIGHTS, "config.json"):
        (model / name).unlink()
        one_line(look, "the folder has only an adapter.*: merge it into its base model")


def quantized(write: Callable[[str, torch.Tensor], Tensors]) -> Callable[[Tensors], Tensors]:
    """Replaces every projection by what ``write`` makes of it."""

    def change(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            stem = name.removesuffix(".weight")
            found.update(write(stem, tensor) if stem.endswith("_proj") else {name: tensor})
        return {name: tensor.clone() for name, tensor in found.items()}

    return change


CODES = torch.zeros(6, 8, dtype=torch.int32)
ENTRIES: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"load_in_4bit": True},
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
}
WRITTEN: dict[str, Callable[[str, torch.Tensor], Tensors]] = {
    "gptq": lambda stem, weight: {f"{stem}.qweight": CODES, f"{stem}.scales": torch.ones(1, 8)},
    "awq": lambda stem, weight: {f"{stem}.qweight": CODES, f"{stem}.qzeros": CODES},
    "compressed-tensors": lambda stem, weight: {f"{stem}.weight_packed": CODES},
    "fp8": lambda stem, weight: {
        f"{stem}.weight": weight.to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_inv": torch.ones(1),
    },
    "bitsandbytes": lambda stem, weight: {
        f"{stem}.weight": CODES.byte(),
        f"{stem}.weight.quant_state.bitsandbytes__nf4": CODES.byte(),
    },
    "hqq": lambda stem, weight: {f"{stem}.W_q": CODES},
    "torchao": lambda stem, weight: {f"{stem}._weight_qdata": CODES.char()},
}


@pytest.mark.parametrize("said", [True, False], ids=["as config.json says", "unsaid"])
@pytest.mark.parametrize("tool", WRITTEN)
def test_weights_that_another_tool_has_quantized(model, tool, said):
    rewrite(model, quantized(WRITTEN[tool]))
    if said:
        change(model / "config.json", quantization_config=ENTRIES[tool])
    look = lambda: resolve(str(model), None, Store(model.parent / "store"))
    one_line(
        look, rf"quantized by another tool already \({f'{tool}' if said else ''}.*_proj.*use the original model"
    )
    one_line(lambda: check_model(str(model), None, False), r"not those of a LlamaForCausalLM")
    if tool != "fp8":
        in_bin(model)
        one_line(look, "quantized by another tool already")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch before 1.6"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_in_bin_files_that_have_the_names_of_weights(model, dtype, zipped):
    """Floats pass, in whichever way they are saved."""
    coded = "model.layers.1.mlp.up_proj.weight"
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(model / WEIGHTS).items()}
    (model / WEIGHTS).unlink()
    save = lambda found: torch.save(found, model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    look = lambda: resolve(str(model), None, Store(model.parent / "store"))
    save({**tensors, "model.norm.weight": tensors["model.norm.weight"].half()})
    look()
    save({**tensors, coded: tensors[coded].data.to(dtype)})
    one_line(look, rf"quantized by another tool already \((I8|F8_E4M3): {coded}\)")


def test_a_model_of_the_hub_that_another_tool_has_quantized(model):
    """It is told before its weights are there; where they are and are floats, it is not."""
    change(model / "config.json", quantization_config=ENTRIES["awq"])
    assert check_snapshot("me/tiny", model)["model_type"] == "llama"
    (model / WEIGHTS).unlink()
    message = r"path=me/tiny: its weights are quantized by another tool already \(awq, 4 bits: its config\.json"
    one_line(lambda: check_snapshot("me/tiny", model), message)


@pytest.mark.own_artifacts
def test_a_quantization_of_which_only_config_json_says_something(lab, model, caplog):
    """As in a model that was merged: its weights are floats. What is saved does not say it again."""
    caplog.set_level("INFO")
    expected = lab.run("method=svd", f"model.path={model}")["metrics"]["ppl"]["value"]
    change(model / "config.json", quantization_config=ENTRIES["gptq"])
    record = lab.run("method=svd", f"model.path={model}", "save.merge=true")
    assert record["metrics"]["ppl"]["value"] == expected
    assert "its weights are floats: the quantization in its config.json (gptq, 4 bits) is ignored" in caplog.text
    saved = json.loads((lab.root / record["merged_checkpoint"] / "config.json").read_text())
    assert "quantization_config" not in saved


# Numbers that are not finite


@pytest.mark.parametrize(
    ("method", "weight", "reason"),
    [
        ("svdllm", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj: its input is not finite"),
        ("svdllm", "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj: its input is not finite"),
        ("kron", "model.norm", "model.layers.2.mlp.down_proj: its gradient is not finite"),
        ("dense quantization=awq", "model.embed_tokens", "block 0: the input of self_attn.q_proj is not finite"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(lab, model, method, weight, reason):
    """And not only the linear in which it was noticed."""
    rewrite(model, lambda tensors: {**tensors, f"{weight}.weight": tensors[f"{weight}.weight"] * torch.nan})
    with pytest.raises(FloatingPointError):
        lab.run(f"model.path={model}", *f"method={method}".split())
    [record] = lab.results.records()
    assert record["reason"].startswith(f"FloatingPointError: {weight}: the weight is not finite ({reason}")
    lab.run(f"model.path={model}", "method=dense")
    [dense] = [record for record in lab.results.records() if record["status"] == "done"]
    assert dense["metrics"]["ppl"]["not_finite"] == weight


def test_an_error_that_names_the_weight_is_left_as_it_is(lab, model):
    name = "model.layers.2.self_attn.k_proj"
    rewrite(model, lambda tensors: {**tensors, f"{name}.weight": tensors[f"{name}.weight"] * torch.nan})
    with pytest.raises(FloatingPointError, match=f"^{name}: a weight to prune is not finite$"):
        lab.run(f"model.path={model}", "method=dense", "pruning=magnitude")


def test_tokens_that_the_model_does_not_have(lab, model):
    """A token that was added to the tokenizer alone matters where a text has it."""
    added = {"id": 260, "content": "the", "special": False, "normalized": True}
    added.update(single_word=False, lstrip=False, rstrip=False)
    content = json.loads((model / "tokenizer.json").read_text())
    change(model / "tokenizer.json", added_tokens=[*content["added_tokens"], added])
    for method in ("dense", "svdllm"):
        one_line(
            lambda method=method: lab.run(f"model.path={model}", f"method={method}"),
            r"its tokenizer gives token 260, but the model has only 260 \(vocab_size in config\.json\)",
        )
