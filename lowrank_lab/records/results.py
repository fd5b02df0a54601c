"""Records: one JSON file a cell, the only thing that reports read.

``<root>/records/<key>.json`` is written when a cell is done, failed or skipped; ``<root>/grids/*.json`` say
which cells somebody asked for, so that the missing ones can be told. ``<root>/running`` has the locks of the cells
that are being computed, and what those that were stopped had made. Models that are kept are in
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

from lowrank_lab import environment, out_of_memory
from lowrank_lab.artifacts.locks import Busy
from lowrank_lab.artifacts.store import Artifact, disk_full, fingerprint, write_json
from lowrank_lab.cells import config, versions
from lowrank_lab.cells.cell import Cell
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.records import old
from lowrank_lab.records.labels import labels
from lowrank_lab.records.seal import read, sealed
from lowrank_lab.redaction import redacted, redacted_message, redacted_settings

log = logging.getLogger(__name__)

FINISHED = ("done", "skipped")
# What every reader may take for granted, in records of older schemas too.
IN_RECORD = {
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
IN_GRID = {"name", "cells"}
PLACES = ("results", "artifacts", "data_root")  # settings that say where things are, and nothing of the cells
CHECKPOINTS = "checkpoints"  # the folder of the models that are kept
CHECKPOINT_NAMES = ("checkpoint", "merged_checkpoint")  # in a record: which of them are this cell's


def now() -> str:
    """The time as records tell it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Record:
    """The record of a cell while it runs: stages and facts are added as they become known.

    ``begun`` is a file that remembers, while there is no number, which artifacts the cell has made: an attempt that
    was stopped or failed counts as the cell's own.
    """

    def __init__(self, cell: Cell, grid: str | None, begun: Path | None = None) -> None:
        self._begun = begun
        self._made: list[str] = _names(begun) if begun is not None else []
        self._made_before = set(self._made)
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
        """Time a stage that leaves no artifact, without the stages within it."""
        start, before = time.perf_counter(), len(self.data["stages"])
        yield
        within = sum(stage["seconds"] for stage in self.data["stages"][before:])
        self._add_stage(name, max(0.0, time.perf_counter() - start - within))

    def artifact(self, name: str, artifact: Artifact) -> Artifact:
        """Note a stage's artifact. ``seconds`` is what this cell spent, ``made_in`` what making it took."""
        identity = f"{artifact.kind}/{artifact.key}"
        reused = artifact.reused and identity not in self._made_before
        self._made_before.discard(identity)  # it is made once, however often it is read
        if not artifact.reused and self._begun is not None:
            self._made.append(identity)
            write_json(self._begun, self._made)
        self._add_stage(
            name,
            0.0 if reused else artifact.seconds,
            artifact=identity,
            reused=reused,
            made_in=round(artifact.seconds, 3),
        )
        if artifact.reused:
            log.info("%s: already there (%s)", name, artifact.key)
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
        """Held by whoever computes the cell (locks.py)."""
        return self.root / "running" / f"{key}.lock"

    def begun(self, key: str) -> Path:
        """See Record."""
        return self.root / "running" / f"{key}.json"

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a cell whatever its status, or None."""
        file = self.path(key)
        record = read(file, IN_RECORD) if file.is_file() else None
        return old.described(record) if record is not None else None

    def finished(self, key: str) -> dict[str, Any] | None:
        """The record of a cell that needs no more work, or None. A failed cell is tried again."""
        record = self.find(key)
        return record if record is not None and record["status"] in FINISHED else None

    @contextmanager
    def recording(self, record: Record) -> Iterator[None]:
        """Run the body of a cell and write its record: done, skipped, or failed with the traceback.

        A failure is raised again once it is written. An interrupted cell leaves no record, nor does one that
        the user can mend (UserError, a full disk) or that another process holds up (Busy).
        """
        environment.reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
            record.data["status"] = "done"
        except (UserError, Busy):
            raise
        except SkippedCell as why:
            record.data.update(status="skipped", reason=str(why))
        except Exception as error:
            if disk_full(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if out_of_memory.ran_out(error):
                reason = f"{reason}; {out_of_memory.ADVICE}"
            record.data.update(status="failed", reason=reason, traceback=traceback.format_exc())
            raise
        finally:
            if record.data["status"] != "running":
                record.data["seconds"] = round(time.perf_counter() - start, 3)
                record.data["peak_memory"] = environment.peak_memory()
                record.data = self.write(record.data)
            if record.data["status"] in FINISHED:
                self.begun(record.data["key"]).unlink(missing_ok=True)

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write a record, without secrets and with a checksum; returns it as it now stands in its file."""
        file = self.path(record["key"])
        for leftover in file.parent.glob(f".{file.name}.tmp-*"):  # of a killed process; we hold the cell's lock
            leftover.unlink(missing_ok=True)
        written = sealed(_without_secrets(record))
        write_json(file, written)
        return written

    def records(self) -> list[dict[str, Any]]:
        """All records, in a fixed order that does not depend on when they were written."""
        found = [read(file, IN_RECORD) for file in sorted((self.root / "records").glob("*.json"))]
        records = [old.described(record) for record in found if record is not None]
        return sorted(records, key=lambda r: (r["model"], r["dataset"], r["method"], -r["ratio"], r["key"]))

    def note_grid(self, overrides: list[str], cells: list[Cell]) -> str:
        """Write down which cells a command asked for; returns the grid's name, its words about cells."""
        words = (word for word in overrides if not word.startswith("hydra"))
        name = redacted(" ".join(word for word in words if word.partition("=")[0] not in PLACES)) or "defaults"
        entries = {cell.key: cell.label for cell in cells}
        file = self.root / "grids" / f"{fingerprint([name, sorted(entries)])}.json"
        write_json(file, {"name": name, "cells": redacted(entries)})
        return name

    def grids(self) -> list[dict[str, Any]]:
        found = [read(file, IN_GRID) for file in sorted((self.root / "grids").glob("*.json"))]
        return [grid for grid in found if grid is not None]


def _components(cell: Cell) -> Iterator[str]:
    for compression in cell.compressions.values():
        yield from compression.components
    for evaluator in cell.evaluators.values():
        yield evaluator.component


def _settings(cell: Cell) -> dict[str, Any]:
    """The configuration; of the compressions their order alone, as their settings have nodes of their own."""
    settings = config.plain(cell.cfg)
    return {**settings, "compressions": list(settings["compressions"])}


def compression_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    """What a record, also one of an older schema, says of a compression; empty where its cell has none of it."""
    if "compressions" in record:
        return record["compressions"].get(name, {})
    if name != "lowrank" or "compression" not in record:
        return {}
    found = {"plan": record["compression"]["ranks"], **record["compression"]}
    return {**found, "refinement": record["refinement"]} if "refinement" in record else found


def _without_secrets(record: dict[str, Any]) -> dict[str, Any]:
    """Metrics hold what models have written, of which only what is known to be a secret is one."""
    messages = {name: redacted_message(record[name]) for name in ("reason", "traceback") if name in record}
    return {**redacted(record), "config": redacted_settings(record["config"]), **messages}


def _names(file: Path) -> list[str]:
    """The artifacts that a file of ``Results.begun`` names; none where there is no such file, or no list in it."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
