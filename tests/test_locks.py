"""Who works on what, on one machine and across machines, and what a process does that would have to wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowrank_lab.artifacts import locks
from lowrank_lab.artifacts.locks import LockedByAnother, locked, owner
from lowrank_lab.cells.cell import Cell
from lowrank_lab.records.results import Results
from lowrank_lab.running import runner

from .conftest import REPOSITORY, Lab

pytestmark = pytest.mark.own_artifacts

HOLDER = """
import sys, time
from pathlib import Path
from lowrank_lab.artifacts.locks import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def another_process_holds(file: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def keyed(lab: Lab, *overrides: str) -> tuple[str, Cell]:
    """The key of a cell, and the cell."""
    [cell] = lab.cells(*overrides)
    return cell.key, cell


def made(results: Results) -> Counter[str]:
    """How many cells say of an artifact that they made it."""
    stages = [stage for record in results.records() for stage in record["stages"] if "artifact" in stage]
    return Counter(stage["artifact"] for stage in stages if not stage["reused"])


def artifacts(root: Path) -> set[str]:
    """All artifacts that a record can name."""
    found = (root / "artifacts").glob("*/*/artifact.json")
    return {f"{file.parent.parent.name}/{file.parent.name}" for file in found}


def test_who_does_not_want_to_wait_is_told_who_has_it(tmp_path):
    lock = tmp_path / "it.lock"
    assert owner(lock) is None
    with another_process_holds(lock) as process:
        assert owner(lock) == f"process {process.pid} on {os.uname().nodename}"
        with (
            pytest.raises(LockedByAnother, match=f"it: locked by process {process.pid} on .*"),
            locked(lock, "it", wait=False),
        ):
            pass
    assert owner(lock) is None  # dead
    with locked(lock, "it", wait=False):  # and replaced at once
        assert owner(lock) == f"process {os.getpid()} on {os.uname().nodename}"
    assert not lock.exists()


def test_who_waits_gets_it_when_the_holder_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.02)
    lock = tmp_path / "it.lock"
    with another_process_holds(lock) as process:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        signal.signal(signal.SIGCHLD, lambda *_: process.poll())  # else it stays a zombie, which has a process id
        start = time.monotonic()
        with locked(lock, "it"):
            assert 0.5 < time.monotonic() - start < 0.9 * locks.LEASE
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def test_a_holder_on_another_machine_counts_while_it_renews_its_lock(tmp_path, monkeypatch):
    """Whether its process lives cannot be told from here, nor whether its clock goes right."""
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "POLL", 0.02)
    lock = tmp_path / "it.lock"
    with locked(lock, "it"):
        marker = lock.read_text()
    elsewhere = marker.replace(f"host={os.uname().nodename}", "host=n7").replace(f"pid={os.getpid()}", "pid=1")
    assert elsewhere != marker
    lock.write_text(elsewhere)
    os.utime(lock, (0, 4e9))  # in the future
    assert owner(lock) == "process 1 on n7"
    os.utime(lock, (0, time.time() - 10))
    assert owner(lock) is None
    with pytest.raises(LockedByAnother), locked(lock, "it", wait=False):
        pass
    start = time.monotonic()
    with locked(lock, "it"):
        assert time.monotonic() - start >= 0.9


def test_a_holder_on_another_machine_that_lets_go_while_it_is_looked_for_is_none(tmp_path, monkeypatch):
    lock = tmp_path / "it.lock"
    with locked(lock, "it"):
        marker = lock.read_text()
    lock.write_text(marker.replace(f"host={os.uname().nodename}", "host=n7"))
    assert owner(lock) is not None

    def meanwhile() -> float:
        lock.unlink()
        return 0.0

    monkeypatch.setattr(locks, "time", SimpleNamespace(time=meanwhile))
    assert owner(lock) is None


def test_a_cell_that_another_process_computes_is_not_computed_again(lab):
    key, cell = keyed(lab)
    with (
        another_process_holds(lab.results.lock(key)),
        pytest.raises(LockedByAnother, match=r"svdllm ratio=0\.8 tiny-llama"),
    ):
        runner.run(cell, wait=False)
    assert lab.results.records() == []
    assert runner.run(cell, wait=False)["status"] == "done"


def test_an_artifact_that_another_process_makes_is_not_made_again(lab):
    """The cell gives up without a record, and what it had made by then counts as its own."""
    key, cell = keyed(lab)
    lock = cell.store.path("statistics", cell.keys.statistics).parent / f".{cell.keys.statistics}.lease"
    with (
        another_process_holds(lock),
        pytest.raises(LockedByAnother, match=f"statistics {cell.keys.statistics}: locked by process"),
    ):
        runner.run(cell, wait=False)
    assert lab.results.records() == []
    assert lab.results.attempt_file(key).exists()
    runner.run(cell, wait=False)
    assert set(made(lab.results)) == artifacts(lab.root)
    assert list((lab.root / "running").iterdir()) == []


def test_what_was_postponed_goes_on_as_it_becomes_free_and_past_failures(lab, monkeypatch, caplog):
    _, broken = keyed(lab, "method=svd")
    _, fine = keyed(lab, "method=svd", "ratio=0.6")
    calls = []

    def run(cell, grid, wait):
        calls.append((cell.ratio, wait))
        if cell is broken:
            raise RuntimeError("broken")
        if not wait:
            raise LockedByAnother("not yet")

    monkeypatch.setattr(runner, "run", run)
    assert not runner.run_postponed([fine, broken], None)
    assert calls == [(0.6, False), (0.8, False), (0.6, False), (0.6, True)]
    assert "broken" in caplog.text


@pytest.mark.parametrize(
    ("processes", "methods", "ratios"),
    [
        pytest.param(2, "svd,svdllm", "0.8,0.6", marks=pytest.mark.slow),  # quick: the workers of test_launchers.py
        pytest.param(8, "svd,asvd_uniform,svdllm", "0.8,0.6,0.4", marks=pytest.mark.slow),
    ],
)
def test_processes_started_at_once_on_one_grid_make_everything_once(lab, processes, methods, ratios):
    command = lab.command("-m", f"method={methods}", f"ratio={ratios}")
    piped = {"stderr": subprocess.PIPE, "text": True}
    for process in [subprocess.Popen(command, cwd=REPOSITORY, **piped) for _ in range(processes)]:
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
    records = lab.results.records()
    assert [record["status"] for record in records] == ["done"] * len(methods.split(",")) * len(ratios.split(","))
    assert made(lab.results) == Counter(artifacts(lab.root))
    assert list((lab.root / "running").iterdir()) == []
