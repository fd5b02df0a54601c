"""The model card of a checkpoint: what it says, that it gives nothing away, and that its code runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM

import lowrank_lab
from lowrank_lab.artifacts.store import Store
from lowrank_lab.evaluation.perplexity import Perplexity
from lowrank_lab.models import origin, tiny
from lowrank_lab.models.source import ModelSource, resolve
from lowrank_lab.reporting.check import check

from . import gguf_files
from .conftest import Lab

SAVED = ("method=svd", "ratio=0.5", "save=true", "save.merge=true")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_root: Path, artifacts: Path) -> tuple[Lab, dict[str, Any]]:
    """A cell of a model folder that has a card and a licence, with both checkpoints; and the dense model's cell."""
    root = tmp_path_factory.mktemp("card")
    (root / "secret place" / "Tiny-1M").mkdir(parents=True)
    model = root / "secret place" / "Tiny-1M"
    tiny.build("llama", model)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\n---\n# Tiny\n"
    )
    lab = Lab(root / "results", data_root, artifacts)
    lab.run(f"model.path={model}", "method=dense")
    return lab, lab.run(f"model.path={model}", *SAVED)


def test_the_front_matter(saved):
    lab, record = saved
    for what, tag in (("checkpoint", "compressed"), ("merged_checkpoint", "merged")):
        assert metadata_load(lab.root / record[what] / "README.md") == {
            "base_model": "Tiny-1M",
            "license": "other",
            "license_name": "tiny-1",  # the link leads to a file that is not here
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["lowrank_lab", tag],
        }


def test_what_it_says(saved):
    lab, record = saved
    text, merged = (
        (lab.root / record[what] / "README.md").read_text() for what in ("checkpoint", "merged_checkpoint")
    )
    [dense] = [one for one in lab.results.records() if one["method"] == "dense"]
    value, before = (one["metrics"]["ppl"]["value"] for one in (record, dense))
    assert "Tiny-1M, compressed with svd at ratio 0.5 by lowrank_lab" in text
    row = rf"\| perplexity \(dataset wikitext2, .*windows 6.*\) \| {value:.4g} \| {before:.4g} \|"
    for one in (text, merged):
        assert re.search(row, one) and "In float32.\n" in one
    now = record["sizes"]["parameters"]
    assert f"| {now:,} of the base model's {dense['sizes']['parameters']:,} |" in text
    assert f"| {dense['sizes']['parameters']:,}, as the base model |" in merged and "no smaller" in merged
    assert "method=svd ratio=0.5 save.checkpoint=true save.merge=true" in text
    assert "model.path=Tiny-1M" in text


def test_it_has_no_path_of_this_machine(saved):
    lab, record = saved
    for what in ("checkpoint", "merged_checkpoint"):
        text = (lab.root / record[what] / "README.md").read_text()
        for private in (str(lab.root), str(lab.data_root), "secret place", str(Path.home()), str(Path.cwd())):
            assert private not in text


def test_it_has_no_secret(lab, checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    token = "hf_" + "Ab3" * 12
    (tmp_path / "model" / "README.md").write_text(f"---\nlicense: other\nlicense_name: {token}\n---\n")
    record = lab.run(f"model.path={tmp_path / 'model'}", "method=svd", "save=true")
    text = (lab.root / record["checkpoint"] / "README.md").read_text()
    assert token not in text and "[redacted]" in text


@pytest.mark.parametrize("what", ["checkpoint", "merged_checkpoint"])
def test_its_code_loads_the_model(saved, monkeypatch, what):
    lab, record = saved
    folder = lab.root / record[what]
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    found: dict[str, Any] = {}
    exec(code, found)
    ids = found["tokenizer"]("the rank", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(found["model"](ids).logits, expected)


def test_the_folder_has_what_transformers_reads_and_the_card(saved):
    lab, record = saved
    names = {
        what: {f.name for f in (lab.root / record[what]).iterdir()} for what in ("checkpoint", "merged_checkpoint")
    }
    plain = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    plain |= {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"checkpoint": plain | {"modeling_lowrank_lab.py"}, "merged_checkpoint": plain}


def test_the_card_may_be_changed_and_nothing_else(saved, tmp_path):
    lab, record = saved
    shutil.copytree(lab.root, tmp_path / "copy")
    copy = Lab(tmp_path / "copy", lab.data_root, lab.artifacts)
    (copy.root / record["checkpoint"] / "README.md").write_text("# Mine")
    assert check(copy.results)[1]
    file = copy.root / record["checkpoint"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    text, whole = check(copy.results)
    assert not whole and f"{file.parent} is damaged (model.safetensors has changed)" in text


def test_another_measurement_of_the_same_checkpoint_is_added(lab):
    lab.run("method=svd", "save=true")
    record = lab.run("method=svd", "save=true", "eval=[ppl,output_error]")
    text = (lab.root / record["checkpoint"] / "README.md").read_text()
    assert "| perplexity (" in text and f"| {next(iter(record['metrics'].values()))['metric']}" in text


def test_a_failed_measurement_leaves_a_card_without_numbers(lab, monkeypatch):
    def fail(*_: Any) -> None:
        raise FloatingPointError("not a number")

    monkeypatch.setattr(Perplexity, "__call__", fail)
    with pytest.raises(FloatingPointError):
        lab.run("method=svd", "ratio=0.55", "save=true")
    [file] = (lab.root / "checkpoints").glob("*/README.md")
    assert "Nothing was measured." in file.read_text()


def test_save_pretrained_takes_it_along(given_results, tmp_path):
    model = lowrank_lab.compress("tiny:llama", "svd", 0.5, results=given_results)
    model.save_pretrained(tmp_path / "kept")
    assert metadata_load(tmp_path / "kept" / "README.md")["base_model"] == "tiny-llama"


@pytest.fixture
def given_results(tmp_path: Path) -> Path:
    return tmp_path / "results"


LICENCES = {
    "README.md": ("---\nlicense: mit\n---\n", {"license": "mit"}),
    "LICENSE": ("                  Apache License\n   Version 2.0", {"license": "apache-2.0"}),
    "LICENSE.txt": ("Ask me first.", {"license": "other"}),
    "COPYING": ("", {"license": "other"}),
    "nothing": ("", {}),
    "README.md ": ("---\nlicense: [a\n---\n", {}),  # no YAML
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_licence_of_a_folder(checkpoints, tmp_path, name):
    text, licence = LICENCES[name]
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    (tmp_path / "model" / name.strip()).write_text(text)
    source = resolve(str(tmp_path / "model"), None, Store(tmp_path / "store"))
    assert origin.licence_of(source) == licence


def test_of_a_model_of_the_hub_its_cache_or_a_request_tells(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _name, file, **_: str(tmp_path / file))
    source = ModelSource("hub", "Model-1", "org/Model-1", "", "commit", {"torch_dtype": "float16"})
    assert (origin.base_model_of(source), origin.licence_of(source)) == ("org/Model-1", {"license": "mit"})
    assert (origin.dtype_of(source), origin.size_of(source)) == ("float16", 5)
    monkeypatch.undo()  # tests have no network
    assert (origin.licence_of(source), origin.size_of(source)) == ({}, None)


@pytest.mark.parametrize(
    ("said", "base_model", "licence"),
    [
        (
            {"general.license": "apache-2.0", "general.source.repo_url": "https://huggingface.co/org/Model-1"},
            "org/Model-1",
            {"license": "apache-2.0"},
        ),
        (
            {
                "general.license": "other",
                "general.license.name": "own",
                "general.license.link": "https://example.org/licence",
                "general.repo_url": "https://example.org/else",
            },
            "it",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/licence"},
        ),
        ({}, "it", {}),
    ],
)
def test_name_and_licence_of_a_gguf_file(tmp_path, said, base_model, licence):
    file = gguf_files.write(tmp_path / "it.gguf", {**gguf_files.vocabulary(["the"]), **said})
    source = resolve(str(file), None, Store(tmp_path / "store"))
    assert (origin.base_model_of(source), origin.licence_of(source)) == (base_model, licence)


def test_the_card_of_one_that_was_compressed_before_names_the_dense_model(saved, tmp_path):
    lab, record = saved
    shutil.copytree(lab.root / record["checkpoint"], tmp_path / "again")
    card = tmp_path / "again" / "README.md"
    card.write_text(card.read_text().replace('"Tiny-1M"', json.dumps("org/Tiny-1M")))
    source = resolve(str(tmp_path / "again"), None, Store(tmp_path / "store"))
    assert origin.base_model_of(source) == "org/Tiny-1M"
    assert origin.licence_of(source) == {"license": "other", "license_name": "tiny-1"}
