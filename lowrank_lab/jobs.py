"""Who works on a cell that has no record yet: a process that holds its lock, or a job of the cluster.

``<results>/jobs/<id>.json`` says which cells the jobs of a submission are for, and where their logs are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from lowrank_lab import slurm
from lowrank_lab.locks import holder
from lowrank_lab.results import Results
from lowrank_lab.store import write_json

log = logging.getLogger(__name__)

OF_ITSELF = ("FAILED", "OUT_OF_MEMORY", "TIMEOUT", "DEADLINE")  # how a job ends that nobody has stopped


def note(results: Results, jobs: dict[str, list[str]], logs: Path) -> None:
    """Write down the cells of each job of one submission."""
    write_json(_folder(results) / f"{next(iter(jobs)).partition('_')[0]}.json", {"jobs": jobs, "logs": str(logs)})


def of_cells(results: Results) -> dict[str, list[str]]:
    """By cell, the jobs that were ever submitted for it, the last one at the end."""
    found: dict[str, list[str]] = {}
    for file in sorted(_folder(results).glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            pairs = [(job, key) for job, keys in json.loads(file.read_text())["jobs"].items() for key in keys]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            log.warning("%s cannot be read and is left out", file)
            continue
        for job, key in pairs:
            found.setdefault(key, []).append(job)
    return found


def at_work(results: Results, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Of cells without a record those that somebody works on, or did: a state of reporting/status.py and why."""
    found = {key: ("running", who) for key in keys if (who := holder(results.lock(key)))}
    submitted = {key: jobs for key, jobs in of_cells(results).items() if key in set(keys) - set(found)}
    queued = slurm.unfinished(job for jobs in submitted.values() for job in jobs)
    if queued is None:
        return found  # no SLURM here: nothing is known of its jobs
    ended = slurm.ends(jobs[-1] for jobs in submitted.values())
    for key, jobs in submitted.items():
        if waiting := [job for job in jobs if job in queued]:
            found[key] = ("queued", f"job {waiting[-1]}, {queued[waiting[-1]].lower()}")
        else:
            how = ended.get(jobs[-1], "")
            state = "failed" if how in OF_ITSELF else "preempted"
            found[key] = (state, f"job {jobs[-1]} has ended{': ' * bool(how)}{how.lower()}")
    return found


def _folder(results: Results) -> Path:
    return results.root / "jobs"
