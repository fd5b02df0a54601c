"""Copies of records and reports to Weights & Biases. The files on disk are the results; these are only copies.

The upload runs in a separate process with a time limit, so that no network, key or server can block a job or
make it fail. Where an online upload fails, the run is written offline instead.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_lab.process import environment
from lowrank_lab.records.results import compression_of

log = logging.getLogger(__name__)


REPORT_TIMEOUT = 120.0  # seconds for a report's tables and figures, which are larger than a record
_unreachable = False  # set by the first online upload of this process that fails: a grid waits for W&B once


class NoTracker:
    def __call__(self, record: dict[str, Any], file: Path) -> None:
        """Do nothing: the record on disk is enough."""

    def track_existing(self, record: dict[str, Any], file: Path) -> str:
        """The same for a record that existed before; returns what was done, in a few words."""
        return ""


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
        self._copied(record, file)

    def track_existing(self, record: dict[str, Any], file: Path) -> str:
        """Copy a record that existed before, unless this was done; returns which, in a few words.

        In a W&B sweep it is always copied, as the run that the agent asked for would otherwise have no numbers.
        """
        mark = self._mark(file)
        if mark.is_file() and mark.read_text() == _identity(record) and not os.environ.get("WANDB_SWEEP_ID"):
            return f"copied to W&B before; delete {mark} to copy it again"
        mode = self._copied(record, file)
        if mode == "disabled":
            return "not copied to W&B, which WANDB_MODE disables"
        return f"copied to W&B ({mode})" if mode else "not copied to W&B"

    def _copied(self, record: dict[str, Any], file: Path) -> str:
        """Copy a record and note it; returns how, "" where it could not be copied."""
        mode = _copy(["record", str(file)], self.project, self.entity, self.timeout)
        if not mode:
            log.warning("W&B: this record could not be copied; it is safe in %s", file)
        elif mode != "disabled":
            mark = self._mark(file)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(_identity(record))
        return mode

    def _mark(self, file: Path) -> Path:
        """The file that says that the record in ``file`` was copied to the project."""
        project = "-".join(filter(None, (self.entity, self.project)))
        return file.parent.parent / "wandb" / "copied" / re.sub(r"[^\w.-]", "_", project) / file.stem


def _identity(record: dict[str, Any]) -> str:
    """What tells a record from a later one of the same cell."""
    return str(record.get("started"))


def log_report(what: str, root: Path, files: list[Path], project: str) -> None:
    """Copy the ``files`` of the report ``what`` on the results ``root`` to a W&B run."""
    if not _copy(["report", what, str(root), *map(str, files)], project, None, REPORT_TIMEOUT):
        log.warning("W&B: the report could not be copied; its files are safe")


def _copy(what: list[str], project: str, entity: str | None, timeout: float) -> str:
    """Copy online if possible, else offline; returns "online", "offline" or "disabled", "" where it failed."""
    global _unreachable
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "disabled":
        return mode
    if mode == "online" and not _unreachable:
        if _upload(what, project, entity, timeout, "online"):
            return mode
        _unreachable = True
        log.warning("W&B: from now on copies are written offline below <results>/wandb; wandb sync uploads them")
    return "offline" if _upload(what, project, entity, timeout, "offline") else ""


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
    """Copy one record to W&B: its config with protocols and ranks, its numbers as summary, its stages' seconds."""
    record = json.loads(file.read_text(encoding="utf-8"))
    run = _run(
        file.parent.parent,
        mode,
        project=project,
        entity=entity,
        group=(record["grid"] or "single")[:128],
        name=_name(record),
        tags=[record["method"], record["dataset"], record["status"]],
        config={
            **record["config"],
            "key": record["key"],
            "git": record["git"],
            "versions": record["versions"],
            "protocol": {name: metric["protocol"] for name, metric in record["metrics"].items()},
            "ranks": compression_of(record, "lowrank").get("plan", {}),
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


def _name(record: dict[str, Any]) -> str:
    """The method, the ratio, what else its label tells, and the model."""
    ratio = f"{record['ratio']:g}"
    told = record["label"].removeprefix(record["method"]).removeprefix(f" ratio={ratio}")
    return f"{record['method']} {ratio}" + told.removesuffix(f" {record['dataset']}")


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
