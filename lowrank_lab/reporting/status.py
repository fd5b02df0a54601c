"""What has become of the cells that somebody asked for."""

from __future__ import annotations

from collections import Counter

from lowrank_lab.results import Results


def status(results: Results) -> str:
    """One line a cell (done, failed, skipped, missing) below each grid, and a count at the end."""
    lines = []
    states: dict[str, str] = {}  # a cell may be in several grids and counts once
    known = {record["key"]: record for record in results.records()}
    for grid in results.grids():
        lines.append(f"grid: {grid['name']}")
        for key, label in sorted(grid["cells"].items(), key=lambda item: item[1]):
            record = known.get(key)
            state = record["status"] if record is not None else "missing"
            states[key] = state
            lines.append(f"  {state:8}{label}{_explain(record, results)}")
    if not lines:
        return f"no grid has been run in {results.root} yet; start with: python run.py"
    total = Counter(states.values())
    counts = ", ".join(f"{total[state]} {state}" for state in ("done", "failed", "skipped", "missing"))
    return "\n".join([*lines, counts])


def _explain(record: dict | None, results: Results) -> str:
    if record is None or record["status"] == "done":
        return ""
    where = f"; traceback in {results.path(record['key'])}" if record["status"] == "failed" else ""
    return f"  ({record['reason']}{where})"
