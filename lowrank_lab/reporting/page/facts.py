"""What the page shows of a record: enough to repeat it, without ranks, answers and other bulk."""

from __future__ import annotations

import math
import shlex
from typing import Any

from lowrank_lab.reporting.tables import outdated


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """The facts of a record as JSON that browsers read."""
    git = record.get("git") or {}
    dirty = " with changes that are not committed" if git.get("dirty") else ""
    shown = {
        "label": record["label"],
        "state": "outdated" if outdated(record) else record["status"],
        "reason": record.get("reason", ""),
        "about": {
            "record": f"records/{record['key']}.json",
            "grid": record.get("grid"),
            "started": record.get("started"),
            "seconds": record.get("seconds"),
            "seed": record.get("seed"),
            "git commit": f"{git.get('commit')}{dirty}",
            "hardware": record.get("hardware", {}),
            "peak memory": record.get("peak_memory", {}),
        },
        "command": shlex.join(["python", *record.get("command", [])]),
        "metrics": {name: _measured(found) for name, found in record["metrics"].items()},
        "left out": record.get("left_out", {}),
        "sizes": {name: value for name, value in record.get("sizes", {}).items() if _short(value)},
        "stages": record.get("stages", []),
        "versions": {**record.get("versions", {}), **record.get("components", {})},
        "content": record.get("content", {}),
        "configuration": record["config"],
        "traceback": record.get("traceback", ""),
    }
    return {name: _plain(value) for name, value in shown.items()}


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    """Its numbers and its protocol; settings, blocks and answers stand in the record alone."""
    numbers = {name: value for name, value in found.items() if _short(value)}
    return {**numbers, "protocol": found.get("protocol", {})}


def _short(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _plain(value: Any) -> Any:
    """With numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
