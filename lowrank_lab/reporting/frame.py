"""Records as one pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

NOT_COMPRESSION = ("model conversion", "model loading", "evaluation tokens", "checkpoint", "merged checkpoint")


def frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each metric of each record, and one for each record without metrics (failed, skipped)."""
    rows = []
    for record in records:
        sizes = record.get("sizes", {})
        image = sizes.get("image") or {}  # None for a model of texts; older records do not have it
        stages = record["stages"]
        row = {
            "model": record["model"],
            "dataset": record["dataset"],
            "method": record["method"],
            "ratio": record["ratio"],
            "status": record["status"],
            "reason": record.get("reason"),
            "ratio_reached": sizes.get("ratio_reached"),
            "parameters": sizes.get("parameters"),
            "bytes": sizes.get("bytes"),
            "image_macs": image.get("macs"),
            "image_macs_dense": image.get("macs_dense"),
            # As if this cell ran alone: artifacts shared with other cells count with what making them took.
            "compression_seconds": _seconds(s for s in stages if _compresses(s["stage"])),
            "key": record["key"],
        }
        for name, metric in record["metrics"].items() or [(None, {})]:
            facts = {column: metric.get(column) for column in ("metric", "value", "protocol")}
            its_own = (s for s in stages if s["stage"].split(".")[:2] == ["eval", name])
            rows.append({**row, "evaluator": name, "evaluation_seconds": _seconds(its_own), **facts})
    return pd.DataFrame(rows)


def _compresses(stage: str) -> bool:
    return stage not in NOT_COMPRESSION and not stage.startswith("eval.")


def _seconds(stages: Iterable[dict[str, Any]]) -> float:
    """The seconds of ``stages``, an artifact's once, however many of them read it."""
    once = {stage.get("artifact", number): stage for number, stage in enumerate(stages)}
    return sum(stage.get("made_in", stage["seconds"]) for stage in once.values())
