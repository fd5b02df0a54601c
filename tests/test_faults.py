"""What happens on real machines: full and read-only disks, damage, no memory, clocks, records of old versions.

kill -9 is in test_kills.py, the hub in test_hub.py, W&B in test_tracking.py, locks in test_store.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.corpora import HubCorpus
from lowrank_lab.commands import report
from lowrank_lab.evaluation import perplexity
from lowrank_lab.lowrank import spectra
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.process.out_of_memory import is_out_of_memory
from lowrank_lab.records import results
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.frame import frame
from lowrank_lab.reporting.status import status
from lowrank_lab.running import context, runner

from .conftest import Lab
from .sites import sites_in
from .test_run import stages

pytestmark = pytest.mark.own_artifacts


class Reported(NamedTuple):
    """What a report exits with: None, 1 or an error of one line; and what it printed."""

    error: str | int | None
    text: str


OLD = sorted(Path(__file__).parent.glob("old_records/*"))


@pytest.fixture
def run_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Reported]:
    """Runs report.py on a results folder as the command does, in this process."""

    def run(root: Path, *arguments: str) -> Reported:
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments, "--results", str(root)])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # report.py puts others in their place
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        capsys.readouterr()
        error: Any = None
        try:
            report.main()
        except SystemExit as stopped:
            error = stopped.code
        return Reported(error, capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    """A lab in which two cells have run, and nothing happened."""
    lab = Lab(tmp_path_factory.mktemp("undisturbed") / "results", data_root)
    for method in ("svd", "svdllm"):
        lab.run(f"method={method}")
    lab.results.write_grid(["method=svd,svdllm"], lab.cells("method=svd,svdllm", multirun=True))
    return lab


# Disks


class Disk:
    """A file system of its own in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str, new: bool = False) -> None:
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            options if new else f"remount,{options}",
            "tmpfs",
            str(self.folder),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this needs a file system of its own, and mounting one is not allowed here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    disk.mount("size=64m", new=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)


def leftovers(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if ".tmp" in file.name]


def test_a_disk_that_is_full_while_artifacts_are_written(lab, undisturbed, disk, caplog):
    """All that was finished is there when there is space again."""
    caplog.set_level("INFO")
    disk.mount("size=500k")
    with pytest.raises(
        UserError, match=rf"no space left for results=.* or artifacts={disk.folder}; finish"
    ) as error:
        lab.run("method=svdllm", f"artifacts={disk.folder}")
    assert "\n" not in str(error.value)
    assert lab.results.records() == []  # the user can mend it: nothing has failed
    assert leftovers(lab.root) == leftovers(disk.folder) == []
    disk.mount("size=64m")
    record = lab.run("method=svdllm", f"artifacts={disk.folder}")
    assert (
        "model conversion: reused from the store" in caplog.text
        and "decomposition: reused from the store" not in caplog.text
    )
    assert record["metrics"] == undisturbed.results.find(record["key"])["metrics"]


def test_a_disk_that_is_full_while_a_record_is_written(lab, undisturbed, disk, caplog):
    caplog.set_level("INFO")
    here = Lab(disk.folder / "results", lab.data_root)
    where = f"artifacts={lab.root}/artifacts"
    disk.mount("size=12k")
    with pytest.raises(UserError, match="no space left"):
        here.run("method=svd", where)
    assert here.results.records() == [] and leftovers(disk.folder) == []
    assert "done (perplexity" not in caplog.text
    disk.mount("size=64m")
    record = here.run("method=svd", where)
    for name in ("model conversion", "decomposition", "eval.ppl"):
        assert f"{name}: reused from the store" in caplog.text
    assert record["metrics"] == undisturbed.results.find(record["key"])["metrics"]


def test_a_disk_that_has_no_space_for_a_lock(lab, disk):
    disk.mount("size=4k")
    (disk.folder / "full").write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match="no space left"):
        lab.run("method=svd", f"results={disk.folder}", f"artifacts={lab.root}/artifacts")


def test_a_disk_that_is_full_while_a_checkpoint_is_written(lab, disk):
    here = Lab(disk.folder / "results", lab.data_root)
    overrides = ("method=svd", "save=true", f"artifacts={lab.root}/artifacts")
    disk.mount("size=200k")
    with pytest.raises(UserError, match="no space left"):
        here.run(*overrides)
    assert list((here.root / "checkpoints").glob("[!.]*")) == leftovers(disk.folder) == []
    disk.mount("size=64m")
    record = here.run(*overrides)
    evaluated = lab.run(f"model.path={here.root / record['checkpoint']}")
    assert evaluated["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]


def test_folders_that_are_read_only_are_one_line_before_any_work(lab, disk):
    disk.mount("ro")
    for name in ("results", "artifacts"):
        with pytest.raises(
            UserError, match=rf"{name}={disk.folder}/mine: {disk.folder} cannot be written to"
        ) as error:
            lab.cells(f"{name}={disk.folder}/mine")
        assert "\n" not in str(error.value)
    done = lab.cli(f"results={disk.folder}/mine", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: results=") and done.stderr.count("\n") == 1


def test_a_file_where_a_folder_should_be(lab, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be written to; choose another folder with results="):
        lab.cells(f"results={tmp_path}/file/results")
    with pytest.raises(UserError, match="results has a character of code 0"):
        lab.cells('results="a\0b"')


def test_results_that_are_read_only_can_be_reported(undisturbed, disk, tmp_path, run_report):
    for name in ("records", "grids"):
        shutil.copytree(undisturbed.root / name, disk.folder / name)
    disk.mount("ro")
    assert re.search(r"done +svdllm ratio=0\.8", run_report(disk.folder, "status").text)
    assert run_report(disk.folder, "check").error is None
    here = run_report(disk.folder)
    assert "| svdllm" in here.text
    assert str(here.error).startswith("error: ") and str(here.error).endswith("choose where to write with --out")
    assert run_report(disk.folder, "--out", str(tmp_path / "out")).error is None
    assert (tmp_path / "out" / "index.html").is_file()


# Damage


def flip(file: Path) -> None:
    """Change one byte and nothing else: neither size nor time."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_check_finds_a_byte_that_is_not_as_it_was_written(lab, run_report):
    record = lab.run("method=svd", "save=true")
    [spectrum, *_] = (lab.root / "artifacts" / "spectra").glob("*/block_001.safetensors")
    damaged = [spectrum, lab.root / record["checkpoint"] / "model.safetensors"]
    assert run_report(lab.root, "check").error is None
    for file in damaged:
        flip(file)
    done = run_report(lab.root, "check")
    assert done.error == 1
    lines = done.text.splitlines()
    assert len(lines) == 3 and lines[-1].endswith("2 damaged")
    for file in damaged:
        [line] = [line for line in lines if str(file.parent) in line]
        assert f"{file.name} has changed): delete it" in line
        shutil.rmtree(file.parent)
    lab.results.path(record["key"]).unlink()
    assert lab.run("method=svd", "save=true")["metrics"] == record["metrics"]
    assert run_report(lab.root, "check").error is None


def test_check_finds_artifacts_that_are_elsewhere(lab, tmp_path, run_report):
    lab.run("method=dense", f"artifacts={tmp_path}/scratch")
    (tmp_path / "scratch" / "others" / "folder").mkdir(parents=True)  # which is none of ours
    [manifest] = (tmp_path / "scratch" / "metric").glob("*/artifact.json")
    manifest.unlink()
    done = run_report(lab.root, "check")
    assert done.error == 1
    assert f"{manifest.parent} is damaged (artifact.json is missing)" in done.text
    assert "1 damaged" in done.text


def test_a_record_that_was_changed_is_left_out_and_made_again(lab, caplog, run_report):
    record = lab.run("method=svd")
    file = lab.results.path(record["key"])
    value = record["metrics"]["ppl"]["value"]
    file.write_text(file.read_text().replace(str(value), str(value / 2)))
    assert lab.results.records() == []
    assert "was changed after it was written (its checksum differs) and is left out; run its cell" in caplog.text
    assert f"{file} was changed" in run_report(lab.root, "check").text
    again = lab.run("method=svd")
    assert again["metrics"] == record["metrics"] and stages(again)["eval.ppl"]
    assert lab.results.find(record["key"]) == again


@pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)
def test_records_of_older_schemas_are_read(folder, tmp_path, run_report):
    """As versions of before wrote them, without a checksum. Their numbers are called outdated and not shown."""
    shutil.copytree(folder, tmp_path / "results")
    records = Results(tmp_path / "results").records()
    assert [f"schema{record['schema']}" for record in records] == [folder.name] * 2
    assert "outdated (made by other component versions; run it again)" in tables.markdown(records)
    assert len(frame(records)) == 2
    for what, shown in (
        ("all", "outdated"),
        ("status", "2 outdated"),
        ("table=asvd/table1", "llama-7b"),
        ("page", "wrote"),
        ("check", "0 damaged"),
    ):
        done = run_report(tmp_path / "results", what)
        assert done.error is None
        assert shown in done.text
    assert "outdated" in (tmp_path / "results" / "index.html").read_text()


# Memory

ON_A_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines of it."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later."),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def test_other_errors_of_a_gpu_are_not_out_of_memory():
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines of it.")


def test_a_site_that_does_not_fit_is_decomposed_on_the_cpu(checkpoints, tmp_path, monkeypatch, caplog):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    tower = FAMILIES["llama"].tower
    sites = sites_in(model, tower)
    for name in ("whole", "without"):
        (tmp_path / name).mkdir()
    arguments = (model, tower, sites, Identity(), None, None)
    spectra.make_spectra(tmp_path / "whole", *arguments, torch.device("cpu"))
    of_site, errors = spectra._spectrum, iter(ON_A_GPU)

    def small_gpu(*given: Any) -> Any:
        *others, device = given
        if device.type == "cuda" and (error := next(errors, None)):
            raise error
        return of_site(*others, torch.device("cpu"))

    monkeypatch.setattr(spectra, "_spectrum", small_gpu)
    spectra.make_spectra(tmp_path / "without", *arguments, torch.device("cuda"))
    assert caplog.text.count("out of memory on cuda; it is decomposed on the CPU") == len(ON_A_GPU)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "without" / file.name).read_bytes()
    monkeypatch.setattr(spectra, "_spectrum", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        spectra.make_spectra(tmp_path / "without", *arguments, torch.device("cpu"))


@pytest.mark.parametrize("error", [ON_A_GPU[1], MemoryError()], ids=["GPU", "RAM"])
def test_a_cell_that_needs_too_much_memory_fails_with_advice_and_lets_go(lab, monkeypatch, error):
    held = []

    def needs_too_much(_folder: Path, model: Any, *_: Any) -> None:
        held.append(weakref.ref(model))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(context, "make_statistics", needs_too_much)
        with pytest.raises(type(error)) as raised:
            lab.run("method=svdllm")
    [record] = lab.results.records()
    assert record["status"] == "failed"
    assert record["reason"].startswith(f"{type(error).__name__}: ")
    assert "lower calibration.batch_size" in record["reason"] and "device=cpu" in record["reason"]
    assert "in needs_too_much" in record["traceback"]
    assert raised.value is error  # a launcher keeps it as long as the grid runs,
    assert held[0]() is None  # but not the model with it
    assert lab.run("method=svdllm")["status"] == "done"


def test_an_evaluation_that_needs_too_much_memory_for_one_row_fails_with_advice(lab, monkeypatch):
    monkeypatch.setattr(perplexity, "check_output", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        lab.run("method=dense")
    [record] = lab.results.records()
    assert "or the batch size of the evaluation" in record["reason"] and "\n" not in record["reason"]


# Texts


def test_a_text_that_cannot_be_read_stops_a_cell_before_compression_and_status_says_why(lab, monkeypatch):
    """As where a file is changed while a grid runs, or a row of the hub has no text."""
    [cell] = lab.cells("method=svd")
    lab.results.write_grid(["method=svd"], [cell])

    def documents(corpus: HubCorpus, split: str, data_root: str | None) -> Iterator[str]:
        raise UserError("test.jsonl line 3: not a JSON object")

    with monkeypatch.context() as patch:
        patch.setattr(HubCorpus, "documents", documents)
        patch.setattr(spectra, "compress", lambda *_: pytest.fail("it compresses"))
        with pytest.raises(UserError):
            runner.run(cell)
    assert "missing   svd" in (text := status(lab.results))
    assert "(test.jsonl line 3: not a JSON object)" in text
    assert runner.run(cell)["status"] == "done"
    assert "not a JSON object" not in status(lab.results)


# Clocks


def test_a_clock_that_goes_backwards(lab, undisturbed, monkeypatch, caplog):
    """Every look at the wall clock is an hour before the last one; durations are told by another."""
    caplog.set_level("INFO")
    hours, now = count(), time.time()

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(now, timezone.utc) - timedelta(hours=next(hours))

    monkeypatch.setattr(results, "datetime", Backwards)
    monkeypatch.setattr(time, "time", lambda: now - 3600.0 * next(hours))
    found = [lab.run(f"method={method}") for method in ("svd", "svdllm")]
    for record in found:
        assert record["status"] == "done"
        assert 0 <= record["seconds"] < 600
        assert all(0 <= stage["seconds"] <= record["seconds"] for stage in record["stages"])
        assert record["metrics"] == undisturbed.results.find(record["key"])["metrics"]
    assert found[1]["started"] < found[0]["started"]
    assert next(hours) > 2, "nobody looked at the clock"
    assert " -" not in "".join(line for line in caplog.messages if " s left" in line)
    assert not list((lab.root / "running").iterdir())
    assert [record["method"] for record in lab.results.records()] == ["svd", "svdllm"]
    assert json.loads(lab.results.path(found[0]["key"]).read_text()) == found[0]
