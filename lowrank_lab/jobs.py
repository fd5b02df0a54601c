"""Which jobs of the cluster are for which cells.

``<results>/jobs/<id>.json`` says which cells the jobs of a submission are for, and where their logs are.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lowrank_lab.results import Results
from lowrank_lab.store import write_json

log = logging.getLogger(__name__)


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


def _folder(results: Results) -> Path:
    return results.root / "jobs"
