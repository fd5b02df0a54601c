"""Reading a model, a checkpoint, an artifact or a record runs no code, and names lead out of no folder."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_lab.artifacts.store import MANIFEST, Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.commands import report
from lowrank_lab.models.load import load_model
from lowrank_lab.planning.dry_run import print_needs
from lowrank_lab.records.labels import labels
from lowrank_lab.reporting import tables
from lowrank_lab.running import training

from .conftest import REPOSITORY

pytestmark = pytest.mark.own_artifacts


class Evil:
    """A pickle of it creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.file)!r}, 'w')",)


@pytest.fixture
def executed(tmp_path: Path) -> Path:
    """The file that exists once code was run."""
    file = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(file)))
    assert file.exists()
    file.unlink()
    return file


@pytest.fixture
def model(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A checkpoint folder to do harm to."""
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    return tmp_path / "model"


def in_bin(folder: Path, **more: Any) -> None:
    """Keep the weights of a checkpoint folder as a pickle."""
    weights = load_model(str(folder), None, "float32", False).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_pickle_of_tensors_is_a_model(lab, model):
    expected = lab.run(f"model.path={model}", "method=dense")["metrics"]["ppl"]["value"]
    in_bin(model)
    assert lab.run(f"model.path={model}", "method=dense")["metrics"]["ppl"]["value"] == expected


def test_a_pickle_of_more_than_tensors_is_not_read(lab, model, executed):
    in_bin(model, more=Evil(executed))
    with pytest.raises(
        UserError, match=r"\.bin weights hold more than tensors .* convert them to safetensors"
    ) as error:
        lab.run(f"model.path={model}", "method=dense")
    assert "\n" not in str(error.value)
    assert not executed.exists()


def test_nor_is_the_state_of_a_training(lab, executed, monkeypatch):
    overrides = ("method=dobi_noremap", "allocation.steps=2", "ratio=0.55")
    with monkeypatch.context() as patch:

        def save_and_stop(state: Path, *_: Any) -> None:
            torch.save({"parameters": Evil(executed)}, state)
            raise KeyboardInterrupt

        patch.setattr(training, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            lab.run(*overrides)
    assert lab.run(*overrides)["status"] == "done"
    assert not executed.exists()


CODE = "open({file!r}, 'w')\nfrom transformers import {base}\nclass Own({base}):\n    model_type = 'own'\n"


@pytest.mark.parametrize("what", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run_unasked(lab, model, executed, what):
    """A model and a tokenizer that are only to be had with the Python file beside them."""
    base = "PretrainedConfig" if what == "config.json" else "PreTrainedTokenizerFast"
    (model / "own.py").write_text(CODE.format(file=str(executed), base=base))
    if what == "config.json":
        change(model / what, model_type="own", auto_map={"AutoConfig": "own.Own"}, architectures=["Own"])
    else:
        change(model / what, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
        (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"is not run unless you say model\.trust_remote_code=true") as error:
        lab.run(f"model.path={model}", "method=dense")
    assert "\n" not in str(error.value)
    if what == "config.json":
        with pytest.raises(UserError, match="is not run unless"):
            print_needs(lab.cells(f"model.path={model}", "method=dense"))
    assert not executed.exists()


def test_a_known_model_that_also_brings_code_is_run_without_it(lab, model, executed):
    (model / "own.py").write_text(CODE.format(file=str(executed), base="PretrainedConfig"))
    change(model / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    assert lab.run(f"model.path={model}", "method=svd")["status"] == "done"
    assert not executed.exists()


def test_an_index_of_weights_does_not_lead_out_of_its_folder(lab, model):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"index\.json names \.\./elsewhere\.safetensors, which is not in this folder"
    ):
        lab.cells(f"model.path={model}", "method=dense")


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname"])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, name, caplog):
    store = Store(tmp_path / "store")
    made = store.get_or_make("kind", "key", lambda folder: (folder / "data").write_text("whole"))  # type: ignore[arg-type, return-value]
    (tmp_path / "outside").write_text("secret")
    manifest = json.loads((made.path / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["data"]
    (made.path / MANIFEST).write_text(json.dumps(manifest))
    assert store.get("kind", "key") is None
    assert f"its manifest names {name}, which is outside of its folder" in caplog.text


TARGETS = [
    {"_target_": "os.system", "command": "touch {file}"},
    {"_target_": "subprocess.Popen", "args": ["touch", "{file}"]},
    {"_target_": "lowrank_lab.process.environment.subprocess.Popen", "args": ["touch", "{file}"]},
    {"_target_": "lowrank_lab.artifacts.store.write_json", "file": "{file}", "value": 1},
]


@pytest.mark.parametrize("settings", TARGETS, ids=lambda settings: settings["_target_"])
def test_reading_a_record_runs_nothing_that_it_names(lab, settings, executed):
    """Neither itself nor within an answer of ours."""
    settings = json.loads(json.dumps(settings).replace("{file}", str(executed)))
    record = lab.run("method=svdllm", "ratio=0.8", "quantization=int4")
    for entry in labels(lab.cells("method=svdllm")[0]):  # as if an older version had written it
        del record[entry]
    quantization = record["config"]["quantization"]
    within = {**quantization, "method": settings}
    for named in (
        {"quantization": settings},
        {"quantization": within},
        {"metric": settings},
        {"storage": settings},
    ):
        lab.results.write({**record, "config": {**record["config"], **named}})
        [read] = lab.results.records()
        assert read["quantization"]["name"] == "INT4"
        assert "| svdllm" in tables.markdown([read])
    assert not executed.exists()


@pytest.mark.parametrize(
    "word",
    [
        "model.path=tiny:../../x",
        "model.path=package:../../x",
        "model.path=package:",
        "'model.path=a\0b'",
        f"model.path={'x' * 5000}",
        "'data_root=a\0b'",
        "dataset.eval.split=../../../x",
        "dataset.eval.split=/etc/hostname",
        "dataset.corpus.mirror=../../x",
        "quantization=../../x",
        "method=../../x",
        "experiment=../../x",
    ],
)
def test_names_that_lead_elsewhere_are_one_line(lab, word):
    with pytest.raises(UserError) as error:
        lab.cells(word.strip("'"))
    assert "\n" not in str(error.value)
    assert not lab.root.exists() or {file.name for file in lab.root.iterdir()} <= {"artifacts"}


@pytest.mark.parametrize("name", ["../../outside", "/outside", "..", "x" * 5000, "é" * 300])
def test_a_checkpoint_stays_in_its_folder_whatever_the_method_is_called(lab, name):
    record = lab.run("method=svd", "save=true", f"method.name='{name}'")
    assert record["status"] == "done"
    folder = lab.root / record["checkpoint"]
    assert folder.resolve().parent == (lab.root / "checkpoints").resolve()
    assert len(folder.name.encode()) <= 255


@pytest.mark.parametrize(
    "what", ["table=../../x", "figure=../../x", "table=/etc/passwd", "table=asvd/../dobi/table2"]
)
def test_a_report_is_of_what_is_in_the_catalogue(lab, what, tmp_path):
    with pytest.raises(UserError, match="no such table or figure") as error:
        report.report(what, lab.results, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_reader_of_files_is_one_that_runs_nothing():
    """A new one is to be looked at here: pickles, and code of models and data sets."""
    readers = ("pickle.load", "torch.load(", "np.load(", "joblib", "trust_remote_code=True", "eval(", "exec(")
    found = {
        (file.relative_to(REPOSITORY).as_posix(), line.strip())
        for file in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "lowrank_lab").rglob("*.py")]
        for line in file.read_text().splitlines()
        for reader in readers
        if reader in line and ".eval(" not in line
    }
    # What a checkpoint says of itself to those who read its code or its card.
    for file, line in list(found):
        if file in ("lowrank_lab/checkpoints/bundle.py", "lowrank_lab/records/model_card.py"):
            assert ".from_pretrained(folder, trust_remote_code=True)" in line or line.startswith("`trust_remote")
            found.remove((file, line))
    assert {file for file, _ in found} == {"lowrank_lab/running/training.py"}
    assert all("weights_only=True" in line for _, line in found)
