"""Grids through a real SLURM, with what happens there: cancelled, requeued and preempted jobs, slurmd restarted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from ..conftest import REPOSITORY, Lab
from .cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]

GRID = ("-m", "method=svd,asvd_uniform,svdllm", "ratio=0.8,0.6,0.4")
JOB = ("gpus_per_node=null", "mem_gb=null", "cpus_per_task=1", "timeout_min=60")
MINUTES = 10 * 60.0  # for what takes seconds on an idle machine


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    """The grid without SLURM."""
    lab = Lab(tmp_path_factory.mktemp("local") / "results", data_root)
    lab.cli(*GRID)
    return lab


@dataclass(frozen=True)
class Launcher:
    process: subprocess.Popen[bytes]
    stderr: Path

    def said(self) -> str:
        return self.stderr.read_text()

    def ended(self) -> int:
        """The exit status, once it has one."""
        return self.process.wait(timeout=MINUTES)


@contextmanager
def launched(lab: Lab, launcher: str, *overrides: str) -> Iterator[Launcher]:
    settings = [f"hydra.launcher.{setting}" for setting in JOB]
    command = lab.command(*GRID, *overrides, f"hydra/launcher={launcher}", *settings)
    # A background job of a shell ignores SIGINT, and so would all that it starts.
    heeds_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    stderr = lab.root.parent / "stderr"
    with open(stderr, "w") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=out, preexec_fn=heeds_ctrl_c)
    try:
        yield Launcher(process, stderr)
    finally:
        process.kill()
        process.wait()


def submissions(lab: Lab) -> list[str]:
    return sorted(file.stem for file in (lab.root / "jobs").glob("*.json"))


def states(cluster: Cluster) -> dict[str, str]:
    """squeue's: the state of each task of each array that waits or runs."""
    return dict(line.split() for line in (cluster.call("squeue", "-h", "-r", "-o", "%i %T") or "").splitlines())


def just_begun(cluster: Cluster) -> str:
    """A job that has begun this moment, and so will not have ended before something is done to it."""
    running = lambda: {job for job, state in states(cluster).items() if state == "RUNNING"}
    before = running()
    cluster.wait_for("a job to begin", lambda: running() - before, MINUTES)
    return (running() - before).pop()


def report(lab: Lab, *what: str) -> str:
    command = [sys.executable, "report.py", *what, "--results", str(lab.root)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def counts(status: str) -> dict[str, int]:
    """By state, the cells in the last line of report.py status."""
    return {state: int(number) for number, state in (word.split() for word in status.splitlines()[-1].split(", "))}


def logs(lab: Lab) -> list[str]:
    """What each job has printed, in the order of their numbers."""
    return [file.read_text() for file in sorted(lab.root.glob("logs/*/slurm/*_log.out"))]


def table(lab: Lab) -> pd.DataFrame:
    """The final table of the command line, without its timings."""
    report(lab)
    [file] = (lab.root / "report").glob("*.csv")
    rows = pd.read_csv(file)
    return rows.drop(columns=[column for column in rows if column.endswith("seconds")])


def test_a_grid_that_is_cancelled_requeued_and_interrupted_has_the_table_of_a_local_run(
    cluster: Cluster, local: Lab, tmp_path: Path, data_root: Path
) -> None:
    lab = Lab(tmp_path / "results", data_root)
    with launched(lab, "slurm") as launcher:
        cluster.wait_for("the submission", lambda: submissions(lab), MINUTES)
        [array] = submissions(lab)
        cluster.wait_for("two jobs", lambda: list(states(cluster).values()).count("RUNNING") == 2, MINUTES)
        seen = counts(report(lab, "status"))
        assert seen["queued"] >= 7 and seen["queued"] + seen.get("running", 0) == 9
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.ended() == 130
        assert f"list them: python report.py status; stop them: scancel {array}" in launcher.said()
    assert states(cluster)  # the jobs go on

    with launched(lab, "slurm") as launcher:
        cluster.wait_for("the launcher", lambda: "jobs of an earlier command" in launcher.said(), MINUTES)
        assert cluster.call("scancel", f"{array}_8") is not None  # which has not begun
        cancelled = just_begun(cluster)
        assert cluster.call("scancel", cancelled) is not None
        assert cluster.call("scontrol", "requeue", just_begun(cluster)) is not None
        cluster.wait_for("a record", lambda: lab.results.records(), MINUTES)
        cluster.stop_slurmd()
        cluster.start_slurmd()
        assert launcher.ended() == 1
        assert "2 not finished; python report.py status says why" in launcher.said()
    assert submissions(lab) == [array]
    told = report(lab, "status")
    assert counts(told) == {"done": 7, "failed": 0, "skipped": 0, "preempted": 2, "missing": 0}
    assert f"job {cancelled}: cancelled; " in told

    with launched(lab, "slurm") as launcher:
        assert launcher.ended() == 0, launcher.said()
        assert "submitted 2 jobs" in launcher.said()
        assert "9/9 " in launcher.said()
    pd.testing.assert_frame_equal(table(lab), table(local))
    assert len(table(lab)) == 9


def test_workers_share_a_grid_and_one_that_runs_out_of_time_comes_back(
    cluster: Cluster, local: Lab, tmp_path: Path, data_root: Path
) -> None:
    lab = Lab(tmp_path / "results", data_root)
    settings = ("hydra.launcher.workers=2", "+hydra.launcher.additional_parameters.comment=shared")
    with launched(lab, "slurm_array", *settings) as launcher:
        cluster.wait_for("a cell in both", lambda: sum(": starting" in log for log in logs(lab)) == 2, MINUTES)
        [array] = submissions(lab)
        # What SLURM sends to a job whose time is nearly over, or that is preempted with time to stop.
        cluster.call("scancel", "--signal=USR2", f"{array}_1")
        assert launcher.ended() == 0, launcher.said()
    cluster.wait_for("the end of the workers", lambda: not states(cluster), MINUTES)
    assert ["Requeued job" in log for log in logs(lab)] == [False, True]
    pd.testing.assert_frame_equal(table(lab), table(local))
    made = [
        stage["artifact"]
        for file in (lab.root / "records").glob("*.json")
        for stage in json.loads(file.read_text())["stages"]
        if not stage.get("reused", True)
    ]
    assert len(made) == len(set(made))
