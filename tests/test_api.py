"""The Python API: the same cells as the command line, from names, folders, loaded models, texts and objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import lowrank_lab
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.cells import config
from lowrank_lab.lowrank.metric.second_moment import SecondMoment
from lowrank_lab.models import tiny
from lowrank_lab.models.load import load_image_processor
from lowrank_lab.records.results import Results
from tests.images import image_folder

from .conftest import Lab

SMALL = {"calibration.samples": 4, "calibration.seqlen": 32}
TEXTS = [f"Document {i} has {i * i} words, or so it says in line {i}." for i in range(200)]


@pytest.fixture
def given(tmp_path: Path, artifacts: Path) -> dict[str, Any]:
    return {"results": tmp_path / "results", **SMALL}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_the_command_line_finds_what_the_api_has_computed(data_root, tmp_path):
    text = {"dataset": "wikitext2", "data_root": str(data_root)}
    calibration = {"calibration.samples": 12, "calibration.seqlen": 32}
    folder = {"results": tmp_path / "results"}
    model = lowrank_lab.compress("tiny:llama", "svdllm", 0.6, **folder, **text, **calibration)
    windows = {"eval.ppl.seqlen": 32, "eval.ppl.max_windows": 6}
    measured = lowrank_lab.evaluate(model, **folder, **text, **windows)
    lab = Lab(tmp_path / "results", data_root)
    record = lab.run("method=svdllm", "ratio=0.6")
    assert record["metrics"]["ppl"]["value"] == pytest.approx(measured["ppl"]["value"], rel=1e-6)
    computed = {s["stage"] for s in record["stages"] if not s.get("reused", True)}
    assert computed == {"evaluation tokens", "eval.ppl"} or computed == {"eval.ppl"}


def test_a_loaded_model_and_its_folder_are_compressed_alike(checkpoints, given):
    folder = checkpoints["llama"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = logits(model)
    loaded = lowrank_lab.compress(model, ratio=0.6, calibration=TEXTS, tokenizer=tokenizer, **given)
    named = lowrank_lab.compress(folder, ratio=0.6, calibration=TEXTS, **given)
    assert torch.equal(logits(model), before)
    assert torch.allclose(logits(loaded), logits(named), atol=1e-6)
    assert not torch.allclose(logits(loaded), before, atol=1e-3)


def test_what_is_returned_and_kept_is_in_the_dtype_of_the_computation(checkpoints, given, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    for settings, wanted in (({}, torch.float32), ({"dtype": "auto"}, torch.bfloat16)):
        given = {**given, "results": tmp_path / str(wanted)}
        model = lowrank_lab.compress(half, ratio=0.6, calibration=TEXTS, tokenizer=tokenizer, **given, **settings)
        [folder] = (tmp_path / str(wanted) / "checkpoints").glob("[!.]*")
        assert model.dtype == AutoModelForCausalLM.from_pretrained(folder).dtype == wanted


def test_what_save_pretrained_keeps_is_the_compressed_model(given, tmp_path):
    model = lowrank_lab.compress("tiny:llama", ratio=0.6, calibration=TEXTS, **given)
    model.save_pretrained(tmp_path / "kept")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert torch.equal(logits(kept), logits(model))


class Halved(SecondMoment):
    """A metric of a notebook."""

    def __init__(self, by: float) -> None:
        super().__init__(cholesky=False)
        self.by = by


def test_an_answer_is_a_name_or_an_object(given):
    by_name = lowrank_lab.compress(
        "tiny:llama", ratio=0.6, calibration=TEXTS, allocation="global_tail", metric="second_moment", **given
    )
    by_object = lowrank_lab.compress(
        "tiny:llama", ratio=0.6, calibration=TEXTS, allocation="global_tail", metric=Halved(0.5), **given
    )
    assert torch.allclose(logits(by_name), logits(by_object), atol=1e-5)
    records = lowrank_lab.results(given["results"])
    assert len(records) == 2 and set(records["status"]) == {"done"}


def test_a_class_of_a_notebook_has_a_name_that_changes_with_its_code(monkeypatch):
    from lowrank_lab import api

    monkeypatch.setattr(Halved, "__module__", "__main__")
    first = api._node(Halved(0.5))
    assert first["by"] == 0.5
    assert api._node(Halved(0.25))["_target_"] == first["_target_"]
    monkeypatch.setattr(Halved, "__call__", lambda self, inputs, outputs: (None, None))
    changed = api._node(Halved(0.5))
    assert changed["_target_"] != first["_target_"]
    assert config.build(first).__class__.__name__ == "Halved"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"model": "tiny:nothing"}, "no such family"),
        ({"model": object()}, "give a name, a folder or a transformers model"),
        ({"calibration": []}, "there is no text"),
        ({"calibration": ["a", 7]}, "text 1 is a int"),
        ({"method": "svdlm"}, "no such option"),
        ({"ratio": 80}, "ratio=80"),
        ({"method": "dense"}, "nothing is compressed"),
    ],
)
def test_mistakes_are_one_line(given, call, message):
    with pytest.raises(UserError, match=message):
        lowrank_lab.compress(**{"model": "tiny:llama", "calibration": TEXTS, **given, **call})


def test_settings_that_do_not_go_together_are_told(given):
    with pytest.raises(SkippedCell, match="positions"):
        lowrank_lab.compress("tiny:llama", calibration=TEXTS, **{**given, "calibration.seqlen": 100_000})


def test_published_tables(tmp_path):
    assert "published" in lowrank_lab.table("asvd/table1", tmp_path).columns


def test_a_loaded_image_classifier_is_compressed_and_measured(tmp_path):
    """Its image processor comes from its folder, or is given; the images are those of a data set."""
    folder = tmp_path / "vit"
    folder.mkdir()
    tiny.build("vit", folder)
    images = {"dataset": "image_folder", "dataset.corpus.folder": str(image_folder(tmp_path / "images"))}
    given = {"results": tmp_path / "results", "calibration.samples": 40, **images}
    model = AutoModelForImageClassification.from_pretrained(folder)
    compressed = lowrank_lab.compress(model, "svdllm", 0.6, **given)
    measured = lowrank_lab.evaluate(compressed, "top1", **given)
    [record] = [r for r in Results(given["results"]).records() if "top1" not in r["metrics"]]
    assert record["sizes"]["ratio_reached"] <= 0.6
    assert measured["top1"]["protocol"]["images"] == 40
    pixels = torch.randn(2, 3, 28, 28)
    assert not torch.allclose(compressed(pixels).logits, model(pixels).logits, atol=1e-3)
    model.config.name_or_path = ""
    with pytest.raises(UserError, match="image processor of a loaded model is not known"):
        lowrank_lab.compress(model, "svdllm", 0.6, **given)
    processor = load_image_processor(str(folder), None, False)
    again = lowrank_lab.compress(model, "svdllm", 0.6, image_processor=processor, **given)
    assert torch.equal(again(pixels).logits, compressed(pixels).logits)
