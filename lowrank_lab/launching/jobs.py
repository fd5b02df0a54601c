"""The state of a cell that has no record yet: a process holds its lock, or a job of the cluster is to compute it.

``<results>/jobs/<id>.json`` lists the cells of each job of a submission, and the folder of their logs.
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
    """A job that was submitted for a cell: its SLURM id, and the file of its output."""

    id: str
    log: str


def save(results: Results, jobs: dict[str, list[str]], logs: str) -> None:
    """Save the cells of each job of a submission. ``logs`` is its submitit_folder."""
    submission = next(iter(jobs)).partition("_")[0]
    write_json(results.root / "jobs" / f"{submission}.json", {"jobs": jobs, "logs": logs})


def jobs_by_cell(results: Results) -> dict[str, list[Job]]:
    """By cell, all jobs that were submitted for it, the last one at the end."""
    found: dict[str, list[Job]] = {}
    for file in sorted((results.root / "jobs").glob("*.json"), key=lambda file: file.stat().st_mtime):
        submission = read(file, {"jobs", "logs"}) or {"jobs": {}}
        for job, keys in submission["jobs"].items():
            for key in keys:
                found.setdefault(key, []).append(Job(job, f"{submission['logs']}/{job}_0_log.out"))
    return found


def states(results: Results, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By cell, its state and the process or job that computes it, for those of ``keys`` that were started.

    The state is ``running``, ``queued``, or, where the last job has ended, ``preempted`` or ``failed``. Where SLURM
    does not answer, cells of its jobs are missing.
    """
    found = {key: ("running", who) for key in keys if (who := owner(results.lock(key)))}
    submitted = {key: jobs for key, jobs in jobs_by_cell(results).items() if key in set(keys) - set(found)}
    active = slurm.unfinished({job.id for jobs in submitted.values() for job in jobs})
    if active is None:
        return found
    final_states = slurm.final_states({jobs[-1].id for jobs in submitted.values()})
    for key, jobs in submitted.items():
        if waiting := [job for job in jobs if job.id in active]:
            found[key] = "queued", f"job {waiting[-1].id}: {active[waiting[-1].id].lower()}"
        else:
            end = final_states.get(jobs[-1].id, "ended")
            found[key] = (
                "failed" if end in NOT_STOPPED else "preempted",
                f"job {jobs[-1].id}: {end.lower()}; {jobs[-1].log}",
            )
    return found
