"""W&B: a copy of the record that can be read back, and that never gets in the way."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowrank_lab.records import tracking
from lowrank_lab.records.tracking import WandbTracker, logged_in

from .conftest import FORKS, Lab

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tracking, "_unreachable", False)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a LevelDB log, in blocks of 32 KiB, of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, message = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            position += left_in_block
            continue
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        message = chunk if kind in (1, 2) else message + chunk  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


@dataclass
class OfflineRun:
    """What an offline run would upload."""

    run: Any
    config: dict[str, Any]
    history: dict[str, Any]
    artifacts: list[Any]


def offline_run(file: Path) -> OfflineRun:
    found = OfflineRun(None, {}, {}, [])
    for entry in wandb_records(file):
        kind = entry.WhichOneof("record_type")
        if kind == "history":
            found.history |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}
        elif kind == "run":
            found.run = entry.run
            found.config |= {i.key: json.loads(i.value_json) for i in entry.run.config.update}
        elif kind == "request" and entry.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(entry.request.log_artifact.artifact)
        elif kind == "artifact":
            found.artifacts.append(entry.artifact)
    assert found.run is not None
    return found


def test_an_offline_run_can_be_read_back(lab):
    record = lab.run("method=svd", "tracker=wandb")
    [file] = (lab.root / "wandb").glob("offline-run-*/*.wandb")
    found = offline_run(file)
    run, history = found.run, found.history
    assert (run.project, run.run_group, run.display_name) == ("lowrank_lab", "single", "svd 0.8 tiny-llama")
    seconds = {stage["stage"]: stage["seconds"] for stage in record["stages"]}
    assert history["ppl/perplexity"] == record["metrics"]["ppl"]["value"]
    assert history["ratio_reached"] == record["sizes"]["ratio_reached"]
    assert history["seconds/decomposition"] == seconds["decomposition"]
    assert found.config["key"] == record["key"]
    assert found.config["ratio"] == 0.8
    assert found.config["protocol"] == {"ppl": record["metrics"]["ppl"]["protocol"]}
    assert found.config["ranks"] == record["compressions"]["lowrank"]["plan"]


def report(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    return FORKS.run("report.py", *arguments, "--results", str(lab.root), "--wandb", "reports")


def written(done: subprocess.CompletedProcess[str]) -> list[Path]:
    return [Path(line.removeprefix("wrote ")) for line in done.stdout.splitlines() if line.startswith("wrote ")]


def test_a_report_is_one_run_with_an_artifact_of_all_files(lab):
    record = lab.run("method=svd")
    done = report(lab)
    assert done.returncode == 0, done.stderr
    [file] = (lab.root / "wandb").glob("offline-run-*/*.wandb")
    found = offline_run(file)
    assert (found.run.project, found.run.display_name, found.run.job_type) == ("reports", "report all", "report")
    [artifact] = [one for one in found.artifacts if one.type == "report"]
    assert artifact.name == "report"
    kept = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert kept.keys() == {str(file.relative_to(lab.root)) for file in written(done)} > {"report/table.md"}
    # What is uploaded later is below the results, and is not what the next report writes over.
    for name, copy in kept.items():
        assert copy.is_relative_to(lab.root / "wandb")
        assert copy.read_bytes() == (lab.root / name).read_bytes()
    table = json.loads((file.parent / "files" / found.history["tables/report/perplexity.path"]).read_text())
    [row] = table["data"]
    assert row[table["columns"].index("value")] == record["metrics"]["ppl"]["value"]
    pictures = {f"figures/{name.removesuffix('.png')}" for name in kept if name.endswith(".png")}
    assert pictures and all(found.history[f"{name}._type"] == "image-file" for name in pictures)


@pytest.mark.slow
def test_a_papers_table_is_a_report_too(lab):
    lab.run("method=svd")
    assert report(lab, "table=asvd/table1").returncode == 0
    [file] = (lab.root / "wandb").glob("offline-run-*/*.wandb")
    found = offline_run(file)
    assert found.run.display_name == "report table=asvd/table1"
    assert found.history["tables/asvd_table1.ncols"] == 18  # also with columns that are empty


def test_what_writes_nothing_logs_nothing(lab):
    lab.run("method=svd")
    assert report(lab, "status").returncode == 0
    assert not (lab.root / "wandb").exists()


def test_a_report_survives_wandb(lab, tmp_path, monkeypatch):
    """For real: its process cannot even import it."""
    lab.run("method=svd")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no wandb today')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    done = report(lab, "page")
    assert done.returncode == 0
    assert "no wandb today" in done.stderr and "its files are safe" in done.stderr
    assert written(done) and all(file.is_file() for file in written(done))


@pytest.mark.slow
def test_a_cell_of_a_sweep_is_the_run_that_the_agent_asked_for(lab, tmp_path, monkeypatch):
    """As wandb's agent starts it; also where the cell has run before, or the sweep would wait for its number."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    asked = {"method": {"value": "svd"}, "ratio": {"value": 0.6}, "calibration.samples": {"value": 8}}
    arguments = create_sweep_command_args({"args": asked})["args_no_hyphens"]
    save_config_file_from_dict(str(tmp_path / "config.yaml"), asked)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "config.yaml"))
    for run_id in ("first", "again"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        lab.cli(*arguments, "tracker=wandb")
    [record] = lab.results.records()
    assert (record["method"], record["ratio"], record["config"]["calibration"]["samples"]) == ("svd", 0.6, 8)
    for run_id in ("first", "again"):
        [file] = (lab.root / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
        found = offline_run(file)
        assert (found.run.run_id, found.run.sweep_id) == (run_id, "sweep1")
        assert found.history["ppl/perplexity"] == record["metrics"]["ppl"]["value"]
        assert found.config["key"] == record["key"]


@pytest.mark.slow
def test_a_finished_cell_is_copied_once_and_the_command_says_so(lab):
    words = ("metric=abs_mean", "metric.alpha=0.25", "method=svd")
    lab.cli(*words)
    told = [lab.cli(*words, "tracker=wandb").stderr for _ in range(2)]
    assert "copied to W&B (offline)" in told[0]
    assert "copied to W&B before" in told[1]
    grid = lab.cli("-m", "ratio=0.8,0.6", *words, "tracker=wandb")  # one finished, one to compute
    assert "copied to W&B before" in grid.stderr
    runs = [offline_run(file).run for file in (lab.root / "wandb").glob("offline-run-*/*.wandb")]
    words_in_name = "metric=abs_mean metric.alpha=0.25 tiny-llama"
    assert sorted(run.display_name for run in runs) == [f"svd 0.6 {words_in_name}", f"svd 0.8 {words_in_name}"]


def test_whether_somebody_is_logged_in_is_told_without_a_server(monkeypatch, tmp_path):
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert logged_in()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logged_in()


def test_a_server_that_does_not_answer_costs_the_time_limit_and_falls_back_to_offline(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    tried = []

    def upload(command, timeout, **_):
        tried.append(command[-1])
        if command[-1] == "online":
            raise tracking.subprocess.TimeoutExpired(command, timeout)
        return tracking.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tracking.subprocess, "run", upload)
    for _ in range(3):  # the records of a grid, which pays the time limit once
        WandbTracker("project", None, 3)({}, tmp_path / "record.json")
    assert tried == ["online", "offline", "offline", "offline"]
    assert caplog.text.count("no answer within 3 s") == 1
    assert caplog.text.count("from now on copies are written offline") == 1


@pytest.mark.slow
def test_a_server_that_is_not_there_leaves_a_grid_its_numbers(lab, grid_lab, monkeypatch):
    """For real: a key, and an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    done = lab.cli("-m", "method=dense,svd", "tracker=wandb", "tracker.timeout=20")
    assert done.stderr.count("W&B (online): ") + done.stderr.count("W&B: no answer") == 1
    assert len(list((lab.root / "wandb").glob("offline-run-*"))) == 2
    others = {r["key"]: r["metrics"] for r in grid_lab.results.records()}
    assert {r["key"]: r["metrics"] for r in lab.results.records()}.items() <= others.items()


def test_an_upload_that_hangs_is_ended(tmp_path, monkeypatch, caplog):
    """For real: the child sleeps, the parent goes on after the time limit."""
    script = tmp_path / "sleeper"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(tracking.sys, "executable", str(script))
    start = time.perf_counter()
    WandbTracker("project", None, 1)({}, tmp_path / "record.json")
    assert time.perf_counter() - start < 10
    assert "it is safe in" in caplog.text


def test_disabled_by_wandbs_own_switch(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(tracking.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    WandbTracker("project", None, 1)({}, tmp_path / "record.json")
