"""What is saved: who may read it, and that a failure to save costs no number."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.models import tiny
from lowrank_lab.models.load import load_model

from .conftest import Lab

ODD = {
    "temperature alone": {"temperature": 0.9, "top_p": 0.6},
    "sampling off": {"do_sample": False, "top_p": 0.6, "top_k": 20},
    "beams": {"early_stopping": True, "length_penalty": 2.0},
    "types": {"max_new_tokens": "many", "early_stopping": 7},
    "unknown": {"temprature": 1.5, "output_scores": True},
    "sampling": {"do_sample": True, "temperature": 0.9},
}
KEPT = {"types": {}, "unknown": {"temprature": 1.5}, "sampling": ODD["sampling"]}


@pytest.fixture
def odd_model(tmp_path: Path) -> Any:
    """Makes a tiny model with these entries in its generation_config.json."""

    def make(entries: Any) -> Path:
        folder = tmp_path / "odd"
        folder.mkdir()
        tiny.build("llama", folder)
        (folder / "generation_config.json").write_text(json.dumps(entries))
        return folder

    return make


@pytest.mark.parametrize("what", ODD)
def test_an_odd_generation_config_is_mended(odd_model, tmp_path, caplog, what):
    model = load_model(str(odd_model({**ODD[what], "eos_token_id": 2})), None, "float32", False)
    checkpoint.save(tmp_path / "saved", model, tiny.byte_tokenizer(), True, None)
    found = GenerationConfig.from_pretrained(tmp_path / "saved")
    found.validate(strict=True)
    kept = KEPT.get(what, {})
    assert {name: getattr(found, name, None) for name in kept} == kept
    assert found.eos_token_id == 2
    for name in set(ODD[what]) - set(kept) - {"do_sample"}:
        assert f"{name}={ODD[what][name]} is left out" in caplog.text
    assert not caplog.records or what != "sampling"


def test_a_generation_config_that_is_no_mapping(odd_model):
    assert load_model(str(odd_model([1, 2])), None, "float32", False).can_generate()


@pytest.mark.own_artifacts
def test_a_failure_to_save_costs_no_number(lab, monkeypatch):
    def fail(*_: Any) -> None:
        raise ValueError("odd tokenizer")

    overrides = ("method=svd", "save=true", "save.merge=true")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        with pytest.raises(UserError, match=r"no checkpoint is saved: .*its numbers are kept") as raised:
            lab.run(*overrides)
    assert "\n" not in str(raised.value)
    [record] = lab.results.records()
    assert record["status"] == "done"
    assert record["not_saved"] == {"checkpoint": "odd tokenizer", "merged_checkpoint": "odd tokenizer"}
    assert record["metrics"]["ppl"]["value"] > 0
    again = lab.run(*overrides)
    assert again["metrics"] == record["metrics"] and "not_saved" not in again
    made = {stage["stage"] for stage in again["stages"] if not stage.get("reused", True)}
    assert made == {"checkpoint", "merged checkpoint"}


def test_a_quantization_by_others_is_not_carried_on(odd_model, tmp_path):
    model = load_model(str(odd_model({})), None, "float32", False)
    model.config.quantization_config = {"quant_method": "fp8"}
    checkpoint.save(tmp_path / "saved", model, tiny.byte_tokenizer(), True, None)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").can_generate()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if not file.name.startswith("."))
    return {str(file): stat.S_IMODE(file.stat().st_mode) for file in files}


@pytest.mark.own_artifacts
def test_all_files_follow_the_umask(lab):
    mask = 0o026
    with umask(mask):
        lab.run("method=svdllm", "save=true", "refinement=sequential_update")
    assert any(name.endswith(".safetensors") for name in modes(lab.root))
    for name, mode in modes(lab.root).items():
        assert mode == (0o777 if Path(name).is_dir() else 0o666) & ~mask, name


@contextmanager
def locked_out(file: Path) -> Iterator[None]:
    """Be a user who may not read ``file``."""
    mode, is_root = file.stat().st_mode, os.geteuid() == 0
    file.chmod(0)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        file.chmod(mode)


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = tmp_path_factory.mktemp("shared")
    changed = [place for place in folder.parents if place.stat().st_mode & 0o005 != 0o005]
    before = [place.stat().st_mode for place in changed]
    for place in (folder, *changed):
        place.chmod(0o777)
    yield folder
    for place, mode in zip(changed, before, strict=True):
        place.chmod(mode)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ""])
def test_a_model_that_may_not_be_read_is_said_to_be_so(shared, data_root, name):
    tiny.build("llama", shared / "model")
    with locked_out(shared / "model" / name), pytest.raises(UserError, match="is not readable for you"):
        Lab(shared / "results", data_root).cells(f"model.path={shared / 'model'}")


def test_an_artifact_that_may_not_be_read_is_said_to_be_so(shared, data_root):
    lab = Lab(shared / "results", data_root)
    with umask(0):
        lab.run("method=svd")
    [file] = (shared / "results" / "artifacts" / "spectra").glob("*/*0.safetensors")
    with locked_out(file), pytest.raises(UserError, match=rf"{file} is not readable for you; its owner can"):
        Store(lab.root / "artifacts").get("spectra", file.parent.name)
