"""Copies of records and reports to Weights & Biases. The files on disk are the results; these are only copies.

The upload runs in a separate process with a time limit, so that no network, key or server can block a job or
make it fail. Where an online upload fails, the run is written offline instead.
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

from lowrank_lab import environment

log = logging.getLogger(__name__)


REPORT_TIMEOUT = 120.0  # seconds for a report's tables and figures, which are larger than a record
_unreachable = False  # set by the first online upload of this process that fails: a grid waits for W&B once


class NoTracker:
    def __call__(self, record: dict[str, Any], file: Path) -> None:
        """Do nothing: the record on disk is enough."""

    def track_existing(self, record: dict[str, Any], file: Path) -> None:
        """The same for a record that existed before."""


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
        if not _copy(["record", str(file)], self.project, self.entity, self.timeout):
            log.warning("W&B: this record could not be copied; it is safe in %s", file)

    def track_existing(self, record: dict[str, Any], file: Path) -> None:
        """Copy a record that existed before only in a W&B sweep, whose run would otherwise have no numbers."""
        if os.environ.get("WANDB_SWEEP_ID"):
            self(record, file)


def log_report(what: str, root: Path, files: list[Path], project: str) -> None:
    """Copy the ``files`` of the report ``what`` on the results ``root`` to a W&B run."""
    if not _copy(["report", what, str(root), *map(str, files)], project, None, REPORT_TIMEOUT):
        log.warning("W&B: the report could not be copied; its files are safe")


def _copy(what: list[str], project: str, entity: str | None, timeout: float) -> bool:
    """Copy online if possible, else offline; returns whether it worked, True also where W&B is disabled."""
    global _unreachable
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "disabled":
        return True
    if mode == "online" and not _unreachable:
        if _upload(what, project, entity, timeout, "online"):
            return True
        _unreachable = True
        log.warning("W&B: from now on copies are written offline below <results>/wandb; wandb sync uploads them")
    return _upload(what, project, entity, timeout, "offline")


def _upload(what: list[str], project: str, entity: str | None, timeout: float, mode: str) -> bool:
    command = [sys.executable, "-m", "lowrank_lab.records.tracking", *what, project, entity or "", mode]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        log.warning("W&B: no answer within %.0f s (%s)", timeout, mode)
        return False
    if done.returncode != 0:
        log.warning("W&B (%s): %s", mode, (done.stderr.strip().splitlines() or ["failed"])[-1])
    return done.returncode == 0


def logged_in() -> bool:
    """Whether W&B would find a key. This sends no request."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run(root: Path, mode: str, **named: Any) -> Any:
    """A W&B run whose files are below ``root``; ``named`` is what it is called and grouped by."""
    import wandb

    # By default W&B stores files of an offline run in the user's home; they belong to the run.
    os.environ.setdefault("WANDB_DATA_DIR", str((root / "wandb").resolve()))
    settings = wandb.Settings(init_timeout=30, silent=True)
    return wandb.init(mode="online" if mode == "online" else "offline", dir=str(root), settings=settings, **named)


def upload(file: Path, project: str, entity: str | None, mode: str) -> None:
    """Copy one record to W&B: its config, its numbers as summary, and its stages' seconds."""
    record = json.loads(file.read_text(encoding="utf-8"))
    run = _run(
        file.parent.parent,
        mode,
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


def upload_report(what: str, root: Path, files: list[Path], project: str, entity: str | None, mode: str) -> None:
    """Copy a report to W&B: all files as one artifact, CSVs also as tables and PNGs also as images."""
    import pandas as pd
    import wandb

    config = {"report": what, "git": environment.git(), "versions": environment.versions()}
    run = _run(root, mode, project=project, entity=entity, name=f"report {what}", job_type="report", config=config)
    artifact, shown = wandb.Artifact("report", "report"), {}
    folder = os.path.commonpath([file.parent for file in files])
    for file in files:
        name = file.relative_to(folder)
        artifact.add_file(str(file), str(name))
        if file.suffix == ".csv":
            table = pd.read_csv(file)
            texts = table.select_dtypes(exclude="number").columns  # a column is of one type, or W&B refuses it
            table[texts] = table[texts].astype(object).fillna("").astype(str)
            shown[f"tables/{name.with_suffix('')}"] = wandb.Table(dataframe=table)
        elif file.suffix == ".png":
            shown[f"figures/{name.with_suffix('')}"] = wandb.Image(str(file))
    run.log_artifact(artifact)
    run.log(shown)
    run.finish()


if __name__ == "__main__":
    kind, *about, project_name, entity_name, upload_mode = sys.argv[1:]
    if kind == "record":
        upload(Path(about[0]), project_name, entity_name or None, upload_mode)
    else:
        reported, results_root, *written = about
        where = (project_name, entity_name or None, upload_mode)
        upload_report(reported, Path(results_root), [Path(file) for file in written], *where)
