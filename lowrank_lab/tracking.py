"""A copy of each record to Weights & Biases. The record on disk is the result; this is only a copy of it.

The upload runs in a process of its own with a time limit, so that no network, key or server can block a job
or take its result along. Where an online upload fails, the run is written offline instead.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class NoTracker:
    def __call__(self, record: dict[str, Any], file: Path) -> None:
        """Keep the record only."""


class WandbTracker:
    """Log every record as one W&B run: grouped by grid, named by method, ratio and model.

    Online where this machine is logged in (WANDB_API_KEY, or ``wandb login``), else offline below
    ``<results>/wandb``, to be uploaded later with ``wandb sync``. WANDB_MODE overrides the choice.
    """

    def __init__(self, project: str, entity: str | None, timeout: float) -> None:
        self.project = project
        self.entity = entity
        self.timeout = timeout

    def __call__(self, record: dict[str, Any], file: Path) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        if mode == "disabled":
            return
        if mode == "online" and self._upload(file, "online"):
            return
        if not self._upload(file, "offline"):
            log.warning("W&B: this record could not be copied; it is safe in %s", file)

    def _upload(self, file: Path, mode: str) -> bool:
        command = [
            sys.executable,
            "-m",
            "lowrank_lab.tracking",
            str(file),
            self.project,
            self.entity or "",
            mode,
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            log.warning("W&B: no answer within %.0f s (%s)", self.timeout, mode)
            return False
        if done.returncode != 0:
            log.warning("W&B (%s): %s", mode, (done.stderr.strip().splitlines() or ["failed"])[-1])
        return done.returncode == 0


def logged_in() -> bool:
    """Whether W&B would find a key, told without asking any server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def upload(file: Path, project: str, entity: str | None, mode: str) -> None:
    """Copy one record to W&B: its config, its numbers as summary, and its stages' seconds."""
    import wandb

    record = json.loads(file.read_text())
    root = file.parent.parent
    run = wandb.init(
        project=project,
        entity=entity,
        group=(record["grid"] or "single")[:128],
        name=f"{record['method']} {record['ratio']:g} {record['model']}",
        tags=[record["method"], record["dataset"], record["status"]],
        config={
            **record["config"],
            "key": record["key"],
            "git": record["git"],
            "versions": record["versions"],
        },
        mode="online" if mode == "online" else "offline",
        dir=str(root),
        settings=wandb.Settings(init_timeout=30, silent=True),
    )
    summary: dict[str, Any] = {
        "status": record["status"],
        "ratio": record["ratio"],
        **record.get("sizes", {}),
    }
    for name, metric in record["metrics"].items():
        summary[f"{name}/{metric['metric']}"] = metric["value"]
    for stage in record["stages"]:
        summary[f"seconds/{stage['stage']}"] = stage["seconds"]
    run.log(summary)
    run.finish()


if __name__ == "__main__":
    record_file, project_name, entity_name, upload_mode = sys.argv[1:]
    upload(Path(record_file), project_name, entity_name or None, upload_mode)
