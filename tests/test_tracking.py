"""W&B: a copy of the record that can be read back, and that never gets in the way."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_lab import tracking
from lowrank_lab.tracking import WandbTracker, logged_in

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


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


def test_an_offline_run_can_be_read_back(lab):
    record = lab.run("method=svd", "tracker=wandb")
    [file] = (lab.root / "wandb").glob("offline-run-*/*.wandb")
    history: dict[str, Any] = {}
    config: dict[str, Any] = {}
    run = None
    for entry in wandb_records(file):
        kind = entry.WhichOneof("record_type")
        if kind == "history":
            history |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}
        elif kind == "run":
            run = entry.run
            config |= {i.key: json.loads(i.value_json) for i in run.config.update}
    assert run is not None
    assert (run.project, run.run_group, run.display_name) == ("lowrank_lab", "single", "svd 0.8 tiny-llama")
    seconds = {stage["stage"]: stage["seconds"] for stage in record["stages"]}
    assert history["ppl/perplexity"] == record["metrics"]["ppl"]["value"]
    assert history["ratio_reached"] == record["sizes"]["ratio_reached"]
    assert history["seconds/decomposition"] == seconds["decomposition"]
    assert config["key"] == record["key"]
    assert config["ratio"] == 0.8


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
    WandbTracker("project", None, 3)({}, tmp_path / "record.json")
    assert tried == ["online", "offline"]
    assert "no answer within 3 s" in caplog.text


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
