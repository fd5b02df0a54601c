"""Records: one JSON file a cell, the only thing that reports read.

``<root>/records/<key>.json`` is written when a cell is done, failed or skipped; ``<root>/grids/*.json`` list
the cells of each command, so that reports can name the missing ones. ``<root>/running`` has the locks of the cells
that are being computed, and the artifacts that stopped cells have computed. Saved models are in
``<root>/checkpoints``. No torch.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowrank_lab.artifacts.locks import LockedByAnother
from lowrank_lab.artifacts.store import Artifact, disk_full, fingerprint, write_json
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.basics.redaction import redacted, redacted_message, redacted_settings
from lowrank_lab.cells import config, versions
from lowrank_lab.cells.cell import Cell
from lowrank_lab.process import environment, out_of_memory, progress
from lowrank_lab.records import old
from lowrank_lab.records.labels import labels
from lowrank_lab.records.seal import read, sealed

log = logging.getLogger(__name__)

FINISHED = ("done", "skipped")
# Entries that every record has, also those of older schemas.
RECORD_ENTRIES = {
    "key",
    "status",
    "label",
    "model",
    "dataset",
    "method",
    "ratio",
    "seed",
    "started",
    "config",
    "metrics",
}
GRID_ENTRIES = {"name", "cells"}
FOLDER_SETTINGS = ("results", "artifacts", "data_root")  # they do not change what a cell computes
CHECKPOINTS = "checkpoints"  # the folder of the saved models
CHECKPOINT_NAMES = ("checkpoint", "merged_checkpoint")  # in a record: which of them are this cell's
SAVED = "saved"  # in a record: of each checkpoint its dtype and bytes; older records do not have it


def now() -> str:
    """The current time in the format of records."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Record:
    """The record of a cell while it runs: stages and facts are added as they become known.

    ``attempt_file`` lists the artifacts that the cell has computed until it is finished. So artifacts of an earlier
    attempt, which was stopped or failed, are not counted as reused.
    """

    def __init__(self, cell: Cell, grid: str | None, attempt_file: Path | None = None) -> None:
        self._attempt_file = attempt_file
        self._computed: list[str] = _artifact_names(attempt_file) if attempt_file is not None else []
        self._computed_before = set(self._computed)
        self.data: dict[str, Any] = {
            "schema": versions.RECORD,
            "key": cell.key,
            "status": "running",
            "label": cell.label,
            "model": cell.source.name,
            "method": cell.cfg.method.name,
            "ratio": cell.ratio,
            "dataset": cell.cfg.dataset.name,
            "seed": cell.cfg.seed,
            "grid": grid,
            "started": now(),
            "command": sys.argv,
            "config": _settings(cell),
            **labels(cell),
            "content": {
                "model": cell.source.content,
                "revision": cell.source.revision,
                "calibration_data": cell.calibration_data,
                "evaluation_data": cell.evaluation_data,
                "training_data": next(iter(cell.training_data.values()), None),
            },
            "versions": environment.versions(),
            "components": versions.used(_components(cell)),
            "git": environment.git(),
            "stages": [],
            "compressions": {},  # by name, what each planned (``plan``) and what came out
            "metrics": {},
            "left_out": {},  # by evaluator, why it measured nothing
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time of a stage that keeps no artifact, without that of the stages within it."""
        start, before = time.perf_counter(), len(self.data["stages"])
        with progress.doing(name):
            yield
        within = sum(stage["seconds"] for stage in self.data["stages"][before:])
        self._add_stage(name, max(0.0, time.perf_counter() - start - within))

    def artifact(self, name: str, artifact: Artifact) -> Artifact:
        """Add a stage's artifact. ``seconds`` is the time that this cell took, ``made_in`` that of computing it."""
        identity = f"{artifact.kind}/{artifact.key}"
        reused = artifact.reused and identity not in self._computed_before
        self._computed_before.discard(identity)  # it counts once, however often it is read
        if not artifact.reused and self._attempt_file is not None:
            self._computed.append(identity)
            write_json(self._attempt_file, self._computed)
        self._add_stage(
            name,
            0.0 if reused else artifact.seconds,
            artifact=identity,
            reused=reused,
            made_in=round(artifact.seconds, 3),
        )
        if artifact.reused:
            log.info("%s: reused from the store (%s)", name, artifact.key)
        return artifact

    def _add_stage(self, name: str, seconds: float, **facts: Any) -> None:
        self.data["stages"].append({"stage": name, "seconds": round(seconds, 3), **facts})


class Results:
    """The records below one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, key: str) -> Path:
        return self.root / "records" / f"{key}.json"

    def lock(self, key: str) -> Path:
        """The lock of the process that computes the cell (locks.py)."""
        return self.root / "running" / f"{key}.lock"

    def attempt_file(self, key: str) -> Path:
        """The file that lists what an unfinished cell has computed (see Record)."""
        return self.root / "running" / f"{key}.json"

    def why_file(self, key: str) -> Path:
        """The file that says why a cell stopped without a record: the error that its user can correct."""
        return self.root / "running" / f"{key}.why.json"

    def why_missing(self, key: str) -> str:
        """Why a cell has no record; "" where it was not run, or was interrupted."""
        try:
            return str(json.loads(self.why_file(key).read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a cell whatever its status, or None."""
        file = self.path(key)
        record = read(file, RECORD_ENTRIES) if file.is_file() else None
        return old.with_labels(record) if record is not None else None

    def finished(self, key: str) -> dict[str, Any] | None:
        """The record of a cell that needs no more work, or None. A failed cell is tried again."""
        record = self.find(key)
        return record if record is not None and record["status"] in FINISHED else None

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Run the body of a cell and write its record: done, skipped, or failed with the traceback.

        A failure is raised again after it is written. An interrupted cell leaves no record, nor does one that the
        user can repair (a UserError, which ``why_missing`` tells; a full disk) or that waits for another process
        (LockedByAnother).
        """
        environment.reset_peak_memory()
        self.why_file(record.data["key"]).unlink(missing_ok=True)  # of an earlier attempt
        start = time.perf_counter()
        try:
            yield
            record.data["status"] = "done"
        except LockedByAnother:
            raise
        except UserError as error:
            write_json(self.why_file(record.data["key"]), {"reason": redacted_message(str(error))})
            raise
        except SkippedCell as why:
            record.data.update(status="skipped", reason=str(why))
        except Exception as error:
            if disk_full(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if out_of_memory.is_out_of_memory(error):
                reason = f"{reason}; {out_of_memory.ADVICE}"
            record.data.update(status="failed", reason=reason, traceback=traceback.format_exc())
            raise
        finally:
            if record.data["status"] != "running":
                record.data["seconds"] = round(time.perf_counter() - start, 3)
                record.data["peak_memory"] = environment.peak_memory()
                record.data = self.write(record.data)
            if record.data["status"] in FINISHED:
                self.attempt_file(record.data["key"]).unlink(missing_ok=True)

    def write(self, record: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
        """Write a record, without secrets and with a checksum; returns what is now in its file."""
        file = self.path(record["key"])
        for leftover in file.parent.glob(f".{file.name}.tmp-*"):  # of a killed process, as we hold the cell's lock
            leftover.unlink(missing_ok=True)
        written = sealed(_without_secrets(record))
        write_json(file, written, indent)
        return written

    def records(self) -> list[dict[str, Any]]:
        """All records, in a fixed order that does not depend on when they were written."""
        found = [read(file, RECORD_ENTRIES) for file in sorted((self.root / "records").glob("*.json"))]
        records = [old.with_labels(record) for record in found if record is not None]
        return sorted(records, key=lambda r: (r["model"], r["dataset"], r["method"], -r["ratio"], r["key"]))

    def write_grid(self, overrides: list[str], cells: list[Cell]) -> str:
        """Write the list of a command's cells; returns the grid's name: the overrides that select cells."""
        words = (word for word in overrides if not word.startswith("hydra"))
        name = (
            redacted(" ".join(word for word in words if word.partition("=")[0] not in FOLDER_SETTINGS))
            or "defaults"
        )
        entries = {cell.key: cell.label for cell in cells}
        file = self.root / "grids" / f"{fingerprint([name, sorted(entries)])}.json"
        write_json(file, {"name": name, "cells": redacted(entries)})
        return name

    def grids(self) -> list[dict[str, Any]]:
        found = [read(file, GRID_ENTRIES) for file in sorted((self.root / "grids").glob("*.json"))]
        return [grid for grid in found if grid is not None]


def _components(cell: Cell) -> Iterator[str]:
    yield from (cell.source.kind.upper(), cell.data.component)  # those that have a version
    for compression in cell.compressions.values():
        yield from compression.components
    for evaluator in cell.evaluators.values():
        yield evaluator.component


def _settings(cell: Cell) -> dict[str, Any]:
    """The configuration; of the compressions their order alone, as their settings have nodes of their own."""
    settings = config.plain(cell.cfg)
    return {**settings, "compressions": list(settings["compressions"])}


def compression_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of a compression in a record, also of an older schema; empty where the cell does not have it."""
    if "compressions" in record:
        return record["compressions"].get(name, {})
    if name != "lowrank" or "compression" not in record:
        return {}
    found = {"plan": record["compression"]["ranks"], **record["compression"]}
    return {**found, "refinement": record["refinement"]} if "refinement" in record else found


def others_in(record: dict[str, Any]) -> dict[str, str]:
    """The compressions of a record besides low rank and quantization, by their axes, as its settings name them."""
    listed = record["config"].get("compressions", ())
    names = {
        axis: str(record["settings"].get(axis, axis)) for axis in listed if axis not in ("lowrank", "quantization")
    }
    return {axis: name for axis, name in names.items() if name != "none"}


def other_compressions(record: dict[str, Any]) -> str:
    """``others_in`` on one line; "" for none."""
    return ", ".join(others_in(record).values())


def _without_secrets(record: dict[str, Any]) -> dict[str, Any]:
    """Metrics contain texts that models have written: there only known secrets are replaced."""
    messages = {name: redacted_message(record[name]) for name in ("reason", "traceback") if name in record}
    return {**redacted(record), "config": redacted_settings(record["config"]), **messages}


def _artifact_names(file: Path) -> list[str]:
    """The artifacts that an attempt file lists; none where the file is missing or has no list."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
