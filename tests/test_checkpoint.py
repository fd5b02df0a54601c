"""Checkpoints: what is read back is what was in memory, through transformers alone; and run.py with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.checkpoints.description import VERSION, Saved
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.remap import Remap
from lowrank_lab.models import tiny
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model, load_tokenizer
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import FactorizedLinear, SharedLatent, site_weight
from lowrank_lab.modules.mixed import MixedLinear

from .conftest import REPOSITORY, Lab
from .sites import sites_in

STORAGES = {"uv": Absorb(0.5), "u": Absorb(1.0), "v": Absorb(0.0), "remap": Remap()}
GROUPINGS = {"each": (), "qkv": ("qkv",), "kv": ("kv",), "inputs": ("qkv", "gate_up")}
IDS = torch.tensor([[1, 80, 97, 120, 33, 55, 200, 41]])


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense checkpoint of every family, with biases that are not zero."""
    folders = {}
    for family in tiny.CONFIGS:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny.build(family, folders[family])
        model = load_model(str(folders[family]), None, "float32", False)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.data = torch.randn(tensor.shape, generator=generator) / 10
        model.config.use_cache = True
        model.save_pretrained(folders[family])
    return folders


def compressed(
    folder: Path, storage: str, grouping: str, dtype: str = "float32", linears: str = "all"
) -> tuple[Any, Saved]:
    """The model in ``folder`` with half the rank everywhere but at its last site, which stays dense."""
    model = load_model(str(folder), None, dtype, False)
    tower = FAMILIES[model.config.model_type].tower
    sites = sites_in(model, tower, GROUPINGS[grouping], linears, storage=STORAGES[storage])
    ranks: dict[str, int | None] = {name: max(1, site.full // 2) for name, site in sites.items()}
    ranks[list(sites)[-1]] = None
    for name, site in sites.items():
        if (rank := ranks[name]) is not None:
            block = blocks_of(model, tower)[site.block]
            u, s, vt = torch.linalg.svd(site_weight(block, site).double(), full_matrices=False)
            STORAGES[storage].install(block, site, u[:, :rank], s[:rank, None] * vt[:rank], s[:rank])
    return model, checkpoint.describe(model, sites, ranks, "mine", 0.5)


def save(folder: Path, model: Any, saved: Saved | None) -> None:
    checkpoint.save(folder, model, tiny.byte_tokenizer(), True, saved)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_same_tensors(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


# Every family with factors as they are; other storages where linears differ: plain, with biases, transposed, fused.
EVERY_STORAGE = [
    (family, storage, "each")
    for family in tiny.CONFIGS
    for storage in STORAGES
    if storage == "uv" or family in ("llama", "qwen2", "gpt2", "phi3")
]
EVERY_GROUPING = [
    (family, storage, grouping)
    for family in tiny.CONFIGS
    for storage in ("uv", "remap")
    for grouping in GROUPINGS
    if set(GROUPINGS[grouping]) <= set(FAMILIES[family].tower.roles) and grouping != "each"
    # A fused linear is its own role, and the row of most families is LLaMA's: qkv need not be seen in each.
    if family not in ("gpt2", "phi3") and (grouping != "qkv" or family in ("llama", "qwen2", "opt"))
]


@pytest.mark.parametrize(("family", "storage", "grouping"), [*EVERY_STORAGE, *EVERY_GROUPING])
def test_a_checkpoint_is_the_model_in_memory(dense, tmp_path, family, storage, grouping):
    model, saved = compressed(dense[family], storage, grouping)
    expected = logits(model)
    save(tmp_path, model, saved)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    assert_same_tensors(model, loaded)
    assert torch.equal(logits(loaded), expected)
    assert str(model) == str(loaded)  # the same modules: shared latents too
    assert loaded.config.use_cache is True
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    merged = loaded.dequantize()
    assert not any(isinstance(m, (FactorizedLinear, MixedLinear)) for m in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_latent_comes_back_shared(dense, tmp_path):
    save(tmp_path, *compressed(dense["llama"], "uv", "inputs"))
    attention = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn
    assert isinstance(attention.q_proj.right, SharedLatent)
    assert attention.k_proj.right is attention.v_proj.right is attention.q_proj.right
    stored = {name for name in tensors(tmp_path) if "layers.0.self_attn" in name and "right" in name}
    prefix = "model.layers.0.self_attn"
    assert stored == {f"{prefix}.q_proj.right.linear.weight", f"{prefix}.o_proj.right.weight"}


def tensors(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_tied_embeddings_stay_tied_and_are_stored_once(dense, tmp_path, family):
    save(tmp_path, *compressed(dense[family], "uv", "each"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert "lm_head.weight" not in tensors(tmp_path)


@pytest.mark.parametrize("saved_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
def test_a_dtype_is_for_the_model_and_leaves_integers_and_scales_alone(dense, tmp_path, dtype, saved_in):
    model, saved = compressed(dense["qwen2"], "remap", "qkv", saved_in)
    save(tmp_path, model, saved)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = getattr(torch, saved_in) if dtype == "auto" else dtype
    for name, tensor in loaded.named_parameters():
        kept = {"int8": torch.int8, "float16": torch.float16, "scale": torch.float32}
        assert tensor.dtype == kept.get(name.split(".")[-1], wanted), name
        assert torch.equal(tensor, model.get_parameter(name).to(tensor.dtype)), name
    assert loaded.dtype == wanted
    if dtype == "auto":
        assert torch.equal(logits(loaded), logits(model))


def test_in_bfloat16(dense, tmp_path):
    model, saved = compressed(dense["llama"], "uv", "inputs", "bfloat16")
    save(tmp_path, model, saved)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_saved_again_by_transformers_it_is_the_same_checkpoint(dense, tmp_path):
    model, saved = compressed(dense["opt"], "remap", "qkv")
    save(tmp_path / "one", model, saved)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert_same_tensors(model, again)
    assert again.config.quantization_config.saved.to_dict() == saved.to_dict()


def test_the_model_without_its_head(dense, tmp_path):
    model, saved = compressed(dense["llama"], "uv", "qkv")
    save(tmp_path, model, saved)
    assert_same_tensors(model.model, AutoModel.from_pretrained(tmp_path))


def test_it_generates(dense, tmp_path):
    save(tmp_path, *compressed(dense["llama"], "uv", "inputs"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the rank", return_tensors="pt").input_ids
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


def test_a_storage_of_somebody_elses_is_said_to_have_no_checkpoint(dense):
    model, saved = compressed(dense["llama"], "uv", "each")
    model.model.layers[0].self_attn.q_proj.left = torch.nn.Identity()
    with pytest.raises(UserError, match="a checkpoint cannot hold this storage"):
        checkpoint.describe(model, saved.sites, saved.ranks, "mine", 0.5)


def test_tensors_of_the_wrong_shape_are_named(dense, tmp_path):
    save(tmp_path, *compressed(dense["llama"], "uv", "each"))
    edit(tmp_path, lambda quantization: quantization["modules"]["model.layers.0.self_attn.q_proj"].update(rank=3))
    with pytest.raises(
        UserError, match=r"damaged: model\.layers\.0\.self_attn\.q_proj\.right\.weight is \(24, 48\)"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


# run.py

SAVED = ("method=svd", "ratio=0.5", "storage=remap", "grouping=qkv")


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> tuple[Lab, dict[str, Any]]:
    """A lab in which one cell has run with both checkpoints, through the command line."""
    lab = Lab(tmp_path_factory.mktemp("saving") / "results", data_root)
    done = lab.cli(*SAVED, "save.merge=true", "save=true")
    [record] = lab.results.records()
    assert f"checkpoint: {lab.root / record['checkpoint']}" in done.stderr
    return lab, record


def test_where_checkpoints_are(saving):
    lab, record = saving
    name = record["checkpoint"].removeprefix("checkpoints/")
    assert name.startswith("svd-0.5-tiny-llama-")
    assert record["merged_checkpoint"] == f"checkpoints/{name}-merged"
    assert {f.name for f in (lab.root / "checkpoints").glob("[!.]*")} == {name, f"{name}-merged"}
    for folder in (lab.root / "checkpoints").glob("[!.]*"):
        assert lab.root.as_posix() not in "".join(f.read_text() for f in folder.glob("*.json"))
        assert load_tokenizer(str(folder), None, False)("a").input_ids


LOGITS = f"logits = lambda path: AutoModelForCausalLM.from_pretrained(path)(torch.tensor({IDS.tolist()})).logits"
LOWRANK_LAB_FIRST = f"""
import lowrank_lab, sys
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
import torch
{LOGITS}
torch.save(logits(sys.argv[1]), sys.argv[3])
"""
TRANSFORMERS_FIRST = f"""
import sys, torch
from transformers import AutoModelForCausalLM
{LOGITS}
merged = logits(sys.argv[2])
assert "lowrank_lab" not in sys.modules and "transformers.quantizers.auto" in sys.modules
import lowrank_lab
compressed = logits(sys.argv[1])
torch.testing.assert_close(merged, compressed, rtol=1e-4, atol=1e-4)
torch.save(compressed, sys.argv[3])
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(LOWRANK_LAB_FIRST, marks=pytest.mark.slow),
        pytest.param(TRANSFORMERS_FIRST, marks=pytest.mark.slow),
    ],
    ids=["first", "second"],
)
def test_a_script_that_only_imports_it(saving, tmp_path, script):
    """In either order; and the merged one loads before."""
    lab, record = saving
    folders = [lab.root / record[what] for what in ("checkpoint", "merged_checkpoint")]
    command = [sys.executable, "-c", script, *map(str, folders), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    expected = logits(AutoModelForCausalLM.from_pretrained(folders[0]))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_is_evaluated_as_it_is(saving, caplog):
    caplog.set_level("INFO")
    lab, record = saving
    folder = lab.root / record["checkpoint"]
    for overrides in ((), ("method=asvd", "ratio=0.3", "save=true")):
        again = lab.run(f"model.path={folder}", *overrides)
        assert again["status"] == "done"
        assert (again["method"], again["ratio"], again["model"]) == ("svd", 0.5, folder.name)
        assert again["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]
        assert again["sizes"] == record["sizes"]
        assert "checkpoint" not in again
    assert (
        f"{folder.name} is compressed already (svd, ratio 0.5): "
        "no method is applied again, it is evaluated as it is" in caplog.text
    )
    assert len(lab.results.records()) == 2  # whatever method was asked for, it is one cell
    merged = lab.run(f"model.path={lab.root / record['merged_checkpoint']}", "method=dense")
    assert merged["metrics"]["ppl"]["value"] == pytest.approx(record["metrics"]["ppl"]["value"], rel=1e-4)
    later = lab.run(f"model.path={folder}", "save.merge=true")
    files = [lab.root / one["merged_checkpoint"] / "model.safetensors" for one in (record, later)]
    assert files[0] != files[1]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_there_is_not_written_again_and_torch_not_imported(saving):
    lab, record = saving
    before = {f: f.stat().st_mtime_ns for f in (lab.root / "checkpoints").rglob("*") if f.is_file()}
    script = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    arguments = lab.overrides(*SAVED, "save=true", "save.merge=true")
    command = [sys.executable, "-c", script, "run.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
    assert "nothing to do" in done.stderr
    assert record["checkpoint"] in done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (("save=true",), {"checkpoint"}),
        (("save.merge=true",), {"merged_checkpoint"}),
        (("save=true", "save.merge=true"), {"checkpoint", "merged_checkpoint"}),
        (("save=false",), set()),
    ],
)
@pytest.mark.own_artifacts
def test_a_finished_cell_only_saves(lab, overrides, kept):
    first = lab.run("method=svd")
    record = lab.run("method=svd", *overrides)
    assert {what for what in ("checkpoint", "merged_checkpoint") if what in record} == kept
    assert record["key"] == first["key"]
    assert record["metrics"] == first["metrics"]
    assert [stage["stage"] for stage in record["stages"] if not stage.get("reused", True)] == (
        [what.replace("_", " ") for what in ("checkpoint", "merged_checkpoint") if what in kept]
        if kept
        else [stage["stage"] for stage in first["stages"] if not stage.get("reused", True)]
    )
    for what in kept:
        assert (lab.root / record[what] / "model.safetensors").is_file()
        shutil.rmtree(lab.root / record[what])
        before = lab.results.find(record["key"])
        assert lab.run("method=svd") == before  # without save it is finished
        assert lab.run("method=svd", *overrides) != before
        assert (lab.root / record[what] / "model.safetensors").is_file()


def test_one_checkpoint_after_the_other(lab):
    merged = lab.run("method=svd", "save.merge=true")["merged_checkpoint"]
    record = lab.run("method=svd", "save=true")
    assert (record["checkpoint"], record["merged_checkpoint"]) == (merged.removesuffix("-merged"), merged)
    assert lab.run("method=svd", "save=true", "save.merge=true") == record


def test_the_dense_model_has_none(lab, caplog):
    caplog.set_level("INFO")
    assert "checkpoint" not in lab.run("method=dense", "save=true", "save.merge=true")
    assert "nothing is compressed, so no checkpoint is saved" in caplog.text
    assert not (lab.root / "checkpoints").exists()


def test_a_ratio_that_leaves_all_dense(lab):
    record = lab.run("method=svd", "ratio=1", "save=true")
    again = lab.run(f"model.path={lab.root / record['checkpoint']}")
    assert again["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]
    assert again["sizes"] == record["sizes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": VERSION + 1},
            f"checkpoint of version {VERSION + 1} .* this lowrank_lab reads version {VERSION}",
        ),
        ({"version": 3, "storage": "cubes"}, "storage cubes"),
        ({"sites": [{"name": "x"}]}, "quantization_config is damaged"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_line(saving, lab, tmp_path, change, message):
    shutil.copytree(saving[0].root / saving[1]["checkpoint"], tmp_path / "copy")
    edit(tmp_path / "copy", lambda quantization: quantization.update(change))
    with pytest.raises(UserError, match=rf"^model\.path=\S+copy: .*{message}") as error:
        lab.cells(f"model.path={tmp_path / 'copy'}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save=5", "save=5 is not valid; it must be true or false"),
        ("save.merge=5", "save.merge=5 is not valid; it must be true or false"),
        ("save.merged=true", "save.merged: no such setting"),
    ],
)
def test_mistakes(lab, override, message):
    with pytest.raises(UserError, match=message):
        lab.cells(override)
