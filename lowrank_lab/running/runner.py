"""Run one cell: return its record if it is finished, else compute it, write its record, and track a copy."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from lowrank_lab.artifacts.locks import LockedByAnother, locked
from lowrank_lab.artifacts.store import Store, disk_full
from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.process import progress, stopping
from lowrank_lab.process.out_of_memory import without_frames
from lowrank_lab.records.results import CHECKPOINT_NAMES, CHECKPOINTS, SAVED, Record, Results
from lowrank_lab.records.seal import SEAL

log = logging.getLogger(__name__)

LAUNCH = "LOWRANK_LAB_LAUNCH"  # variable with the id of a launch, for its workers and their records


def run(cell: Cell, grid: str | None = None, wait: bool = True) -> dict[str, Any]:
    """Return the record of a cell. A finished one is found without importing torch.

    Raises UserError for what a user can repair, before any model is loaded; any other failure is written into
    the record with its traceback and raised again: FloatingPointError where a number is not finite. Where another
    process computes the cell, or an artifact that it needs, this waits for it; with ``wait`` False it raises
    LockedByAnother instead.
    """
    cfg = cell.cfg
    results = Results(cfg.results)
    if (saved := cell.saved) is not None:
        further = ", ".join(one.name or name for name, one in cell.compressions.items())
        what = f"it is only changed further by {further}" if further else "it is evaluated as it is"
        facts = (cell.source.name, saved.method, saved.ratio)
        log.info("%s is compressed already (%s, ratio %g): no method is applied again, %s", *facts, what)
    elif cell.wants_checkpoint and not cell.checkpoints:
        log.info("%s: nothing is compressed, so no checkpoint is saved", cell.label)
    if (record := _final_record(cell, results)) is None:
        try:
            with locked(results.lock(cell.key), cell.label, wait):
                if (
                    record := _final_record(cell, results)
                ) is None:  # else the process that held the lock has computed it
                    cell.store.waits = wait
                    return _compute_and_record(cell, results, grid)
        except Exception as error:
            if not disk_full(error):
                raise
            raise UserError(
                f"no space left for results={cfg.results} or artifacts={cfg.artifacts}; finished results are kept"
            ) from error
    log.info("%s: %s already (%s)%s", cell.label, record["status"], summary(record), tracked(cell, record))
    return record


def tracked(cell: Cell, record: dict[str, Any]) -> str:
    """Give a record that was there before to the tracker; returns what it did, for the end of a line."""
    did = config.build(cell.cfg.tracker).track_existing(record, Results(cell.cfg.results).path(cell.key))
    return f"; {did}" if did else ""


def _compute_and_record(cell: Cell, results: Results, grid: str | None) -> dict[str, Any]:
    """Compute a cell, write its record, and track a copy."""
    cfg = cell.cfg
    progress.cell_starts(cell.label)
    log.info("%s: starting", cell.label)
    if cell.left_out and cell.evaluators:
        log.info("%s", cell.left_out_message)
    recording = Record(cell, grid, results.attempt_file(cell.key))
    if launch := os.environ.get(LAUNCH):
        recording.data["launch"] = launch
    previous = results.find(cell.key) or {}
    recording.data.update({what: previous[what] for what in (*CHECKPOINT_NAMES, SAVED) if what in previous})
    try:
        with progress.never_silent(), results.recording(recording), stopping.heeded():
            if "torch" not in sys.modules:
                log.info("importing torch and transformers")
            with progress.doing("importing torch and transformers"):
                from lowrank_lab.running.pipeline import compute

            compute(cell, recording)
    except Exception as error:
        if "traceback" in recording.data and not isinstance(error, FloatingPointError):
            log.error("%s", recording.data["traceback"].rstrip())
        raise without_frames(error)  # noqa: B904 - it is the same error
    finally:
        record = recording.data
        if SEAL in record:  # it is written, which the record of an interrupted cell is not
            log.info("%s: %s (%s), %.0f s", cell.label, record["status"], summary(record), record["seconds"])
            config.build(cfg.tracker)(record, results.path(cell.key))
    if not_saved := record.get("not_saved"):
        what = "; ".join(f"no {name.replace('_', ' ')} is saved: {why}" for name, why in not_saved.items())
        raise UserError(f"{cell.label}: {what}; its numbers are kept, and the same command only saves")
    return record


def check_devices(cells: Iterable[Cell]) -> None:
    """Raise UserError where this machine lacks a device of ``cells``. Imports torch where one is named."""
    for device in sorted({cell.cfg.device for cell in cells} - {"auto", "cpu"}):
        from lowrank_lab.running.context import pick_device

        pick_device(device)


def run_postponed(cells: list[Cell], grid: str | None) -> bool:
    """Run cells that were locked by other processes, each when it is free; returns whether none failed.

    A cell that fails does not stop the others.
    """
    waiting, locked_in_a_row, success = deque(cells), 0, True
    while waiting:
        stopping.check()
        cell = waiting.popleft()
        all_are_locked = locked_in_a_row > len(waiting)
        try:
            run(cell, grid, wait=all_are_locked)
        except LockedByAnother:
            waiting.append(cell)
            locked_in_a_row += 1
            continue
        except (UserError, FloatingPointError) as error:
            log.error("error: %s: %s", cell.label, error)
            success = False
        except Exception:
            log.exception("a cell failed")
            success = False
        locked_in_a_row = 0
        progress.cell_done()
    return success


def finished(cell: Cell) -> dict[str, Any] | None:
    """The record of a cell that needs no more work, or None. No torch.

    A cell that is done but lacks a wanted checkpoint, or has it in another dtype, is run again: its numbers are
    artifacts and are reused.
    """
    results = Results(cell.cfg.results)
    record = results.finished(cell.key)
    if record is None or record["status"] != "done":
        return record
    store = Store(results.root)
    for what, name in cell.checkpoints.items():
        if record.get(what) != f"{CHECKPOINTS}/{name}" or store.get(CHECKPOINTS, name) is None:
            return None
    return record


def _final_record(cell: Cell, results: Results) -> dict[str, Any] | None:
    """The record of a cell that is finished, or has failed in this launch, whose workers try each cell once."""
    if (record := finished(cell)) is None and (launch := os.environ.get(LAUNCH)):
        record = results.find(cell.key)
        if record is not None and (record["status"] != "failed" or record.get("launch") != launch):
            return None
    return record


def _value_in_words(measured: dict[str, Any]) -> str:
    value = measured["value"]
    if value is None:
        where = measured.get("not_finite")
        return f"nan ({measured.get('reason') or (f'{where} is not finite' if where else 'no reason given')})"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def summary(record: dict[str, Any]) -> str:
    """A record's numbers, or why it has none, in a few words; and which checkpoints were saved."""
    if "reason" in record:
        return record["reason"]
    of = Counter(measured["metric"] for measured in record["metrics"].values())
    metrics = record["metrics"].items()
    numbers = [f"{m['metric'] if of[m['metric']] == 1 else name} {_value_in_words(m)}" for name, m in metrics]
    return ", ".join([*numbers, *(record[what] for what in CHECKPOINT_NAMES if what in record)])
