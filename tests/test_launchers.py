"""Grids in other processes, and what is known of them, without a SLURM; tests/slurm has one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lowrank_lab.basics.errors import UserError
from lowrank_lab.launching import grids as launching
from lowrank_lab.launching import jobs, slurm
from lowrank_lab.launching.grids import Grid
from lowrank_lab.records.results import Results
from lowrank_lab.reporting.status import asked, status
from lowrank_lab.running import runner

from .conftest import REPOSITORY, broken_checkpoint
from .test_locks import another_process_holds, artifacts, made

pytestmark = pytest.mark.own_artifacts

LOCAL = ("hydra/launcher=local", "hydra.launcher.workers=2")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_share_a_grid_and_try_a_cell_that_fails_once(lab, tmp_path, workers):
    models = f"{broken_checkpoint(tmp_path / 'broken')},tiny:llama"
    of_workers = (LOCAL[0], f"hydra.launcher.workers={workers}")
    done = lab.cli("-m", "method=svd,svdllm", f"model.path={models}", *of_workers, check=False)
    assert done.returncode == 1
    assert "error: of 4 cells 2 failed; python report.py status says why" in done.stderr
    assert "4/4 " in done.stderr
    assert sorted(record["status"] for record in lab.results.records()) == ["done", "done", "failed", "failed"]
    said = "".join(file.read_text() for file in lab.root.glob("logs/*/worker-?.log"))
    assert said.count(": failed (FloatingPointError") == 2
    assert said.count(": failed already (FloatingPointError") == 2 * (workers - 1)
    assert made(lab.results) == Counter(artifacts(lab.root))  # everything once
    assert len(list((lab.root / "grids").glob("*.json"))) == 1
    assert len({record["grid"] for record in lab.results.records()}) == 1


@pytest.mark.slow
def test_workers_understand_settings_of_their_launcher_from_anywhere(lab, tmp_path):
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(
        "# @package _global_\ndefaults: [{override /hydra/launcher: local}]\nhydra: {launcher: {workers: 1}}\n"
    )
    words = ("experiment=mine", "method=svd", "++hydra.launcher.workers=1", "+hydra.launcher.note=new")
    lab.cli("--config-dir", str(tmp_path / "conf"), "-m", *words)
    assert [record["status"] for record in lab.results.records()] == ["done"]
    assert len(list(lab.root.glob("logs/*/worker-?.log"))) == 1


def test_a_cell_that_failed_is_tried_again_by_the_next_launch_whatever_the_clocks_say(lab, tmp_path, monkeypatch):
    failing = ("method=svd", f"model.path={broken_checkpoint(tmp_path / 'broken')}")
    monkeypatch.setenv(runner.LAUNCH, "one")
    with pytest.raises(FloatingPointError):
        lab.run(*failing)
    assert lab.run(*failing)["launch"] == "one"  # as it was found
    [record] = lab.results.records()
    lab.results.write({**record, "started": "2999"})
    monkeypatch.setenv(runner.LAUNCH, "two")
    with pytest.raises(FloatingPointError):
        lab.run(*failing)
    assert lab.run(*failing)["launch"] == "two"


@pytest.mark.slow
def test_workers_stop_with_their_launcher(lab):
    command = lab.command("-m", "method=svd,svdllm", "ratio=0.8,0.6", *LOCAL)
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not any(cell.state == "running" for cell in asked(lab.results)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert {cell.state for cell in asked(lab.results)} <= {"missing", "done"}
    for file in lab.root.glob("logs/*/worker-?.log"):
        assert "stopped; finished results are kept" in file.read_text()


class Words(Grid):
    """A grid of which nothing is left, whose workers say how many threads they have."""

    def command(self, overrides: list[str], name: str) -> list[str]:
        return [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]


class NoSecond(Grid):
    """A grid whose first worker would go on for long, and whose second one cannot be started."""

    def command(self, overrides: list[str], name: str) -> list[str]:
        if name == "worker-1":
            return ["/no/such/command"]
        return [sys.executable, "-c", "import time; time.sleep(280)"]


def test_where_a_worker_cannot_be_started_those_before_it_are_stopped(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def recorded(*words, **settings):
        started.append(popen(*words, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    with pytest.raises(FileNotFoundError, match="/no/such/command"):
        launching.local(NoSecond(Results(tmp_path), {}, {}, [], [], tmp_path, 0), {"workers": 2})
    [first] = started
    try:
        assert first.returncode == -signal.SIGTERM
    finally:
        first.kill()


class Breaks(Grid):
    """A grid whose second worker breaks at its start."""

    def command(self, overrides: list[str], name: str) -> list[str]:
        return [sys.executable, "-c", f"import sys; sys.exit({name == 'worker-1'})"]


def test_of_a_worker_that_breaks_the_log_is_named(tmp_path):
    grid = Breaks(Results(tmp_path), {"key": None}, {}, [], [], tmp_path, 0)
    with pytest.raises(
        UserError, match=f"1 not finished; python report.py status or {tmp_path}/worker-1.log says why"
    ):
        launching.local(grid, {"workers": 2})


def test_a_damaged_record_is_told_of_once_and_not_at_every_look(tmp_path, caplog):
    results = Results(tmp_path)
    results.path("key").parent.mkdir()
    results.path("key").write_text("{")
    with pytest.raises(UserError, match="1 not finished"):
        launching.local(Words(results, {"key": None}, {}, [], [], tmp_path, 0), {"workers": 1})
    assert caplog.text.count("cannot be read") == 1


@pytest.mark.parametrize(("chosen", "threads"), [(None, "2"), ("7", "7")])
def test_workers_divide_the_cores_unless_told_otherwise(tmp_path, monkeypatch, chosen, threads):
    monkeypatch.setattr(launching, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    launching.local(Words(Results(tmp_path), {}, {}, [], [], tmp_path / "logs", 0), {"workers": 3})
    assert [file.read_text() for file in (tmp_path / "logs").glob("*.log")] == [f"{threads}\n"] * 3


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("hydra/launcher=local",), "error: hydra/launcher is for grids; add -m"),
        (("-m", *LOCAL[:1], "hydra.launcher.workers=0"), "error: hydra.launcher.workers=0 is not valid"),
        (("-m", "hydra/launcher=slurm"), "error: this machine has no sbatch"),
        (
            ("-m", *LOCAL[:1], "eval=ppl,speed"),
            "error: eval=speed depends on the machine and the process that measures it",
        ),
    ],
)
def test_a_launcher_that_cannot_work_is_one_line(lab, monkeypatch, overrides, error):
    monkeypatch.setenv("PATH", str(lab.root))
    done = lab.cli("method=svd", *overrides, check=False)
    assert done.returncode == 1
    assert error in done.stderr
    assert "Traceback" not in done.stderr


def test_without_submitit_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[slurm\]'"):
        slurm.check()


def commands(folder: Path, **scripts: str) -> str:
    """A PATH on which there are these commands, by name with what a shell does for them, before all others."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_what_slurm_says_of_jobs(tmp_path, monkeypatch):
    squeue = 'echo "7_1|RUNNING"; echo "7_3|PENDING"; echo "8|PENDING"'
    sacct = 'echo "7_0|CANCELLED by 0"; echo "7_[3-4%2]|PENDING"; echo "9|TIMEOUT"; echo "$*" > ' + str(
        tmp_path / "asked"
    )
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", squeue=squeue, sacct=sacct))
    assert slurm.unfinished(["7_0", "7_1", "7_3"]) == {"7_1": "RUNNING", "7_3": "PENDING"}
    assert slurm.final_states(["7_0", "9", "11"]) == {"7_0": "CANCELLED", "9": "TIMEOUT"}
    assert (tmp_path / "asked").read_text().endswith("--jobs=11,7,9\n")
    assert slurm.unfinished([]) == slurm.final_states([]) == {}


@pytest.mark.parametrize(
    ("squeue", "answer"),
    [
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", {}),
        ("echo Unable to contact slurm controller >&2; exit 1", None),
    ],
)
def test_no_answer_is_not_taken_for_an_end(tmp_path, monkeypatch, squeue, answer):
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", squeue=squeue))
    assert slurm.unfinished(["7"]) == answer


def test_where_squeue_does_not_answer_nothing_is_submitted_again(tmp_path, monkeypatch):
    broken = "echo Unable to contact slurm controller >&2; exit 1"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", squeue=broken, sbatch=f"touch {tmp_path}/submitted"))
    jobs.save(Results(tmp_path), {"7": ["key"]}, "/logs")
    grid = Grid(Results(tmp_path), {"key": None}, {"key": []}, [], [], tmp_path, 0)
    for launch in (launching.slurm_jobs, launching.slurm_array):
        with pytest.raises(UserError, match="squeue does not answer, so jobs of an earlier command may still"):
            launch(grid, {"workers": 1})
    assert not (tmp_path / "submitted").exists()


def test_status_tells_who_works_on_a_cell_or_why_nobody_does(lab, tmp_path, monkeypatch):
    cells = lab.cells("method=svd", "ratio=0.9,0.8,0.7,0.6,0.5,0.4,0.3", multirun=True)
    lab.results.write_grid(["a grid"], cells)
    keys = [cell.key for cell in cells]
    jobs.save(lab.results, {f"7_{number}": [key] for number, key in enumerate(keys[1:])}, "/logs")
    (lab.root / "jobs" / "1.json").write_text('{"jobs": ')  # of a disk that was full
    squeue, sacct = 'echo "7_1|PENDING"', 'echo "7_2|OUT_OF_MEMORY"; echo "7_3|CANCELLED by 0"'
    sacct += '; echo "7_4|NODE_FAIL"; echo "7_5|BOOT_FAIL"'
    with another_process_holds(lab.results.lock(keys[0])) as process:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", commands(tmp_path / "bin", squeue=squeue, sacct=sacct))
            told = {cell.key: (cell.state, cell.reason) for cell in asked(lab.results)}
            lines = status(lab.results).splitlines()
        monkeypatch.setenv("PATH", str(tmp_path))
        without = {cell.key: cell.state for cell in asked(lab.results)}
    assert told[keys[0]][0] == "running" and told[keys[0]][1].startswith(f"process {process.pid} on ")
    assert [told[key] for key in keys[1:]] == [
        ("preempted", "job 7_0: ended; /logs/7_0_0_log.out"),
        ("queued", "job 7_1: pending"),
        ("failed", "job 7_2: out_of_memory; /logs/7_2_0_log.out"),
        ("preempted", "job 7_3: cancelled; /logs/7_3_0_log.out"),
        ("failed", "job 7_4: node_fail; /logs/7_4_0_log.out"),
        ("failed", "job 7_5: boot_fail; /logs/7_5_0_log.out"),
    ]
    assert lines[-1] == "0 done, 3 failed, 0 skipped, 1 running, 1 queued, 2 preempted, 0 missing"
    assert [without[key] for key in keys] == ["running"] + ["missing"] * 6


def test_a_cell_with_a_record_is_what_the_record_says_once_its_job_has_ended(lab, tmp_path, monkeypatch):
    [cell] = lab.cells("method=svd")
    lab.results.write_grid(["a grid"], [cell])
    lab.results.write({**lab.run("method=svd", "ratio=0.8"), "status": "failed", "reason": "broken"})
    jobs.save(lab.results, {"7": [cell.key]}, "/logs")
    for squeue, state in (("true", "failed"), ('echo "7|RUNNING"', "queued")):
        path = commands(tmp_path / "bin", squeue=squeue, sacct='echo "7|CANCELLED"')
        with monkeypatch.context() as patch:
            patch.setenv("PATH", path)
            assert [found.state for found in asked(lab.results)] == [state]
