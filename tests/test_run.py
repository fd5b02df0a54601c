"""Cells from the command line to the record: reuse, resume, failure, interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from lowrank_lab.basics.errors import UserError
from lowrank_lab.lowrank import spectra
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables

from .conftest import REPOSITORY, Lab, broken_checkpoint

pytestmark = pytest.mark.own_artifacts


def stages(record) -> dict[str, bool]:
    """By stage, whether its artifact was there already."""
    return {stage["stage"]: stage.get("reused", False) for stage in record["stages"]}


WANTED = ("-m", "method=dense,svd,asvd,svdllm", "ratio=0.8,0.6")
MANY = ("-m", "method=dense,svd", "ratio=0.9,0.8,0.7,0.6,0.5,0.4,0.3")  # quick ones
TELLS_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


def by_cell(lab: Lab) -> dict[tuple[str, float], dict]:
    return {(r["method"], r["ratio"]): r for r in lab.results.records()}


def test_the_grid_has_a_record_for_each_cell(grid_lab):
    records = by_cell(grid_lab)
    methods = ("svd", "asvd", "svdllm")
    assert set(records) == {("dense", 1.0), *((m, r) for m in methods for r in (0.8, 0.6))}
    assert {r["status"] for r in records.values()} == {"done"}


def test_a_record_says_all_that_is_needed_to_trust_it(grid_lab):
    record = by_cell(grid_lab)["svdllm", 0.8]
    assert record["config"]["metric"]["_target_"].endswith("SecondMoment")
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["git"]) == {"commit", "dirty"}
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["cores"] >= 1
    assert record["peak_memory"]["resident_mib"] > 50
    assert record["seconds"] > 0
    assert record["seed"] == 0
    assert len(record["calibration"]["sha256"]) == 64
    assert record["calibration"]["tokens"] == 12 * 32
    protocol = record["metrics"]["ppl"]["protocol"]
    assert protocol["windows"] == 6
    assert protocol["window"] == protocol["stride"] == 32
    assert protocol["windows_available"] > 6
    assert protocol["bos"] == "text"
    assert protocol["split"] == "test"
    assert protocol["join"] == "\n\n"
    assert len(protocol["sha256"]) == 64


def test_sizes_in_the_record_are_those_of_the_tensors(grid_lab):
    dense = by_cell(grid_lab)["dense", 1.0]["sizes"]
    record = by_cell(grid_lab)["svdllm", 0.6]
    sizes, ranks = record["sizes"], record["compressions"]["lowrank"]["plan"]
    assert len(ranks) == sizes["sites"]["count"] == 3 * 7
    assert sizes["ratio_asked"] == 0.6
    assert sizes["ratio_reached"] == sizes["sites"]["parameters"] / sizes["sites"]["parameters_dense"]
    assert 0.5 < sizes["ratio_reached"] <= 0.6
    saved = sizes["sites"]["parameters_dense"] - sizes["sites"]["parameters"]
    assert dense["parameters"] - sizes["parameters"] == saved
    assert dense["macs_per_token"] - sizes["macs_per_token"] == saved
    assert sizes["bytes"] == 4 * sizes["parameters"]
    assert sizes["kv_cache_bytes_per_token"] == dense["kv_cache_bytes_per_token"] == 2 * 3 * 2 * 12 * 4


def test_one_calibration_serves_all_methods_and_one_decomposition_all_ratios(grid_lab):
    records = grid_lab.results.records()
    for name, made_once in (("calibration", 1), ("decomposition", 3), ("model conversion", 1)):
        assert sum(not stages(r)[name] for r in records if name in stages(r)) == made_once
    assert "calibration" not in stages(by_cell(grid_lab)["svd", 0.8])


def test_another_ratio_only_slices_and_evaluates(grid_lab):
    record = grid_lab.run("method=svdllm", "ratio=0.4")
    reused = stages(record)
    assert reused["calibration"]
    assert reused["decomposition"]
    assert not reused["eval.ppl"]


@pytest.mark.parametrize("text", ['{"status": "do', "{}", "[]"])
def test_a_record_that_cannot_be_read_is_made_again(lab, text, caplog):
    record = lab.run("method=svd")
    lab.results.path(record["key"]).write_text(text)
    assert lab.results.records() == []
    assert "cannot be read and is left out" in caplog.text
    assert lab.run("method=svd")["metrics"] == record["metrics"]


def test_a_full_disk_is_one_line(lab, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spectra, "save_file", full)
        with pytest.raises(UserError, match=r"no space left for results=.* finished results are kept"):
            lab.run("method=svd")
    assert list((lab.root / "artifacts" / "spectra").glob("[!.]*")) == []
    [conversion] = (lab.root / "artifacts" / "model").glob("*/artifact.json")
    made = conversion.stat().st_mtime_ns
    assert lab.run("method=svd")["status"] == "done"
    assert conversion.stat().st_mtime_ns == made


def test_the_same_grid_again_computes_nothing(grid_lab):
    before = {f: f.stat().st_mtime_ns for f in grid_lab.root.rglob("*") if f.suffix in (".json", ".safetensors")}
    command = [sys.executable, "-c", TELLS_TORCH, "run.py", *grid_lab.overrides(*WANTED)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert "8 cells, 8 finished already" in done.stderr
    assert "svdllm ratio=0.8 tiny-llama wikitext2: done (perplexity" in done.stderr
    after = {f: f.stat().st_mtime_ns for f in before}
    assert {f for f in before if before[f] != after[f] and f.parent.name != "grids"} == set()


def test_a_finished_cell_does_not_stand_for_others_of_its_method(lab):
    """What differs in a setting is a cell of its own, and runs."""
    lab.cli("method=dense", "quantization=gptq")
    done = lab.cli("-m", "method=dense", "quantization=gptq", "quantization.sequential=true,false")
    assert "2 cells, 1 finished already" in done.stderr
    assert len(lab.results.records()) == 2


def test_more_rank_less_error(grid_lab):
    for method in ("svd", "asvd", "svdllm"):
        errors = [
            by_cell(grid_lab)[method, ratio]["compressions"]["lowrank"]["squared_error"] for ratio in (0.8, 0.6)
        ]
        assert 0 < errors[0] < errors[1]


def test_ratio_one_is_the_dense_model(grid_lab):
    full = grid_lab.run("method=svdllm", "ratio=1")
    dense = by_cell(grid_lab)["dense", 1.0]
    assert full["sizes"]["parameters"] == dense["sizes"]["parameters"]
    assert full["metrics"]["ppl"]["value"] == pytest.approx(dense["metrics"]["ppl"]["value"], rel=1e-6)


def test_bfloat16_and_bos_windows(lab):
    record = lab.run("dtype=bfloat16", "eval.ppl.bos=window")
    assert record["sizes"]["bytes"] == 2 * record["sizes"]["parameters"]
    assert record["metrics"]["ppl"]["protocol"]["bos"] == "window"


def test_few_calibration_tokens_are_warned_about(lab):
    record = lab.run("calibration.samples=2")
    assert "fewer than four times the widest input (80)" in record["calibration"]["warning"]
    assert lab.run("calibration.samples=12")["calibration"]["warning"] is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("ratio=0.001",), "leaves no rank"),
        (("eval.ppl.seqlen=4096",), "longer than the 2048 positions"),
        (("calibration.seqlen=4096",), "longer than the 2048 positions"),
        (("eval.ppl.seqlen=128", "dataset.eval.max_documents=1"), "fewer than a window"),
        (("calibration.seqlen=128", "dataset.calibration.max_documents=1"), "fewer than seqlen=128"),
    ],
)
def test_a_cell_that_makes_no_sense_is_skipped_with_its_reason(lab, overrides, reason):
    record = lab.run(*overrides)
    assert record["status"] == "skipped"
    assert reason in record["reason"]
    assert lab.run(*overrides)["started"] == record["started"]  # recognised, not tried again


def test_a_skipped_cell_does_not_stop_the_grid(lab):
    done = lab.cli("-m", "method=svd", "ratio=0.001,0.6")
    assert done.returncode == 0
    assert {r["ratio"]: r["status"] for r in lab.results.records()} == {0.001: "skipped", 0.6: "done"}


def test_a_failed_cell_keeps_its_traceback_and_is_tried_again(lab, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(spectra, "decompose", broken)
        with pytest.raises(RuntimeError, match="no more memory"):
            lab.run("method=svd")
    [record] = lab.results.records()
    assert record["status"] == "failed"
    assert record["reason"] == "RuntimeError: no more memory"
    assert "in broken" in record["traceback"]
    assert lab.run("method=svd")["status"] == "done"


def test_an_interrupted_retry_does_not_report_the_old_failure(lab, monkeypatch, caplog):
    caplog.set_level("INFO")
    for error in (RuntimeError("broken"), KeyboardInterrupt()):

        def stop(*_, error=error):
            raise error

        caplog.clear()
        monkeypatch.setattr(spectra, "decompose", stop)
        with pytest.raises(type(error)):
            lab.run("method=svd")
        assert ("failed (RuntimeError: broken)" in caplog.text) == isinstance(error, RuntimeError)


def test_a_failed_cell_does_not_stop_the_grid(lab, tmp_path):
    """A model whose weights are not finite fails; the cells after it run."""
    broken = broken_checkpoint(tmp_path / "broken")
    done = lab.cli("-m", "method=svd", f"model.path={broken},tiny:llama", check=False)
    assert done.returncode == 1
    assert "model.layers.1.mlp.up_proj: the weight is not finite" in done.stderr
    assert {r["model"]: r["status"] for r in lab.results.records()} == {
        "broken": "failed",
        "tiny-llama": "done",
    }


def numbers(lab: Lab) -> str:
    """The final table without its timings."""
    rows = tables.comparison(lab.results.records())
    return rows.drop(columns=["compression_seconds", "evaluation_seconds"]).to_csv()


def stopped_after_two_records(
    lab: Lab, how: signal.Signals, wanted: Sequence[str]
) -> tuple[int, str, dict[str, str]]:
    """Run the grid and stop it by ``how``: its exit status, what it said, and the records it left."""
    command = lab.command(*wanted)
    # A background job of a shell ignores SIGINT, and so would all that it starts.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)
    records = lab.root / "records"
    deadline = time.time() + 120
    while len(list(records.glob("*.json"))) < 2 and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, how)
    _, stderr = process.communicate(timeout=60)
    kept = {f.name: f.read_text() for f in records.glob("*.json")}
    assert len(kept) >= 2, stderr
    return process.returncode, stderr, kept


@pytest.mark.slow  # a cell that is killed is in test_kills.py
def test_a_grid_that_is_killed_goes_on_where_it_was(grid_lab, tmp_path, data_root):
    """kill -9 after the second record: only what is missing runs, and the table is the undisturbed one."""
    lab = Lab(tmp_path / "results", data_root)
    status, _, kept = stopped_after_two_records(lab, signal.SIGKILL, WANTED)
    assert status == -signal.SIGKILL
    assert len(kept) < 7
    lab.cli(*WANTED)
    for name, text in kept.items():
        assert (lab.root / "records" / name).read_text() == text
    undisturbed = Lab(tmp_path / "undisturbed", data_root)
    (undisturbed.root / "records").mkdir(parents=True)
    for name in (file.name for file in (lab.root / "records").glob("*.json")):
        shutil.copy(grid_lab.root / "records" / name, undisturbed.root / "records")
    assert len(undisturbed.results.records()) == 7
    assert numbers(lab) == numbers(undisturbed)


@pytest.mark.parametrize(
    ("how", "status"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_ctrl_c_and_sigterm_stop_cleanly(tmp_path, data_root, how, status):
    returned, stderr, _ = stopped_after_two_records(Lab(tmp_path / "results", data_root), how, MANY)
    assert returned == status
    assert stderr.splitlines()[-1] == ("stopped; finished results are kept, repeat the command to continue")
    assert "Traceback" not in stderr
    assert list((tmp_path / "results").rglob("*.tmp-*")) == []


def test_two_seeds_are_two_cells_and_the_same_seed_the_same_numbers(lab, tmp_path, data_root):
    one = lab.run("seed=1")
    other = Lab(tmp_path / "other", data_root)
    assert other.run("seed=1")["metrics"] == one["metrics"]
    assert lab.run("seed=2")["metrics"]["ppl"]["value"] != one["metrics"]["ppl"]["value"]


def test_a_checkpoint_folder_is_a_model(lab, tmp_path):
    from lowrank_lab.models import tiny

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tiny.build("mistral", folder)
    by_path = lab.run(f"model.path={folder}", "method=dense")
    assert by_path["model"] == "checkpoint"
    by_name = lab.run("model.path=tiny:mistral", "method=dense")
    assert by_path["metrics"]["ppl"]["value"] == by_name["metrics"]["ppl"]["value"]


def test_device_that_is_not_there(lab):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = lab.cli("device=cuda", check=False)
    assert done.returncode != 0
    assert lab.results.records() == []  # nothing failed: the user can mend it
    assert done.stderr.splitlines()[-1] == "error: device=cuda: this machine has 0 GPUs; use device=auto or cpu"


def test_records_are_json_without_nan(grid_lab):
    for file in (grid_lab.root / "records").glob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in a record"))


def test_a_grid_over_results_folders_is_noted_in_each(tmp_path, data_root):
    lab = Lab(tmp_path / "one", data_root)
    lab.cli("-m", "method=svd,dense", f"results={tmp_path}/one,{tmp_path}/other")
    for folder in ("one", "other"):
        [noted] = Results(tmp_path / folder).grids()
        assert set(noted["cells"]) == {record["key"] for record in Results(tmp_path / folder).records()}
