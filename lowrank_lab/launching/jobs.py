"""The state of a cell that has no record yet: a process has its lock, or a job of the cluster is for it.

``<results>/jobs/<id>.json`` says which cells the jobs of a submission are for, and where their logs are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_lab.artifacts.locks import owner
from lowrank_lab.artifacts.store import write_json
from lowrank_lab.launching import slurm
from lowrank_lab.records.results import Results
from lowrank_lab.records.seal import read

# Ends of a job that was not cancelled or preempted. SLURM queues one that loses its node again, unless configured
# otherwise.
NOT_STOPPED = ("FAILED", "OUT_OF_MEMORY", "TIMEOUT", "DEADLINE", "NODE_FAIL", "BOOT_FAIL")


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a cell: SLURM's id of it, and the file that has what it prints."""

    id: str
    log: str


def note(results: Results, jobs: dict[str, list[str]], logs: str) -> None:
    """Write down the cells of each job of a submission. ``logs`` is its submitit_folder."""
    submission = next(iter(jobs)).partition("_")[0]
    write_json(results.root / "jobs" / f"{submission}.json", {"jobs": jobs, "logs": logs})


def of_cells(results: Results) -> dict[str, list[Job]]:
    """By cell, the jobs that were ever submitted for it, the last one at the end."""
    found: dict[str, list[Job]] = {}
    for file in sorted((results.root / "jobs").glob("*.json"), key=lambda file: file.stat().st_mtime):
        noted = read(file, {"jobs", "logs"}) or {"jobs": {}}
        for job, keys in noted["jobs"].items():
            for key in keys:
                found.setdefault(key, []).append(Job(job, f"{noted['logs']}/{job}_0_log.out"))
    return found


def states(results: Results, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By cell, its state and the process or job behind it, for those of ``keys`` that were started.

    The state is ``running``, ``queued``, or, where the last job has ended, ``preempted`` or ``failed``. Where SLURM
    does not answer, cells of its jobs are missing.
    """
    found = {key: ("running", who) for key in keys if (who := owner(results.lock(key)))}
    submitted = {key: jobs for key, jobs in of_cells(results).items() if key in set(keys) - set(found)}
    known = slurm.unfinished({job.id for jobs in submitted.values() for job in jobs})
    if known is None:
        return found
    ends = slurm.ends({jobs[-1].id for jobs in submitted.values()})
    for key, jobs in submitted.items():
        if waiting := [job for job in jobs if job.id in known]:
            found[key] = "queued", f"job {waiting[-1].id}: {known[waiting[-1].id].lower()}"
        else:
            end = ends.get(jobs[-1].id, "ended")
            found[key] = (
                "failed" if end in NOT_STOPPED else "preempted",
                f"job {jobs[-1].id}: {end.lower()}; {jobs[-1].log}",
            )
    return found
