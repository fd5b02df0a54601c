"""Speeds: a row a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Measured, Section, number


def _describe_speed(protocol: Mapping[str, Any]) -> str:
    where = protocol["cpu"] if protocol["device"] == "cpu" else str(protocol["gpu"])
    how = f"threads: {protocol['threads']}, {protocol['new_tokens']} tokens decoded after each prompt"
    return f"{where}, {how}, median of {protocol['repeats']}"


def _speed_cells(measured: Measured) -> list[dict[str, str]]:
    """A row a setting; × is against the dense model in the same run, with the quartiles of the repeats."""
    ideal = measured["ideal"]
    rows = []
    for one in measured["settings"]:
        row = {"batch": str(one["batch_size"]), "prompt": str(one["prompt"])}
        for phase, ideals in (("prefill", [one["ideal_prefill"]]), ("decode", [ideal["macs"], ideal["bytes"]])):
            ratio = one[f"{phase}_ratio"]
            speeds = [one["model"] and one["model"][phase], one["dense"] and one["dense"][phase]]
            row[f"{phase} (tokens/s, dense)"] = ", ".join(
                number(speed["tokens_per_second"]) if speed is not None else "out of memory" for speed in speeds
            )
            row[f"{phase} ×"] = "{median:.2f} ({q1:.2f}–{q3:.2f})".format(**ratio) if ratio is not None else "—"
            row[f"ideal {phase} ×"] = " / ".join(dict.fromkeys(map("{:.2f}".format, ideals)))
        memory = one["model"] and one["model"]["memory_bytes"]
        row["memory on top (MB)"] = "—" if memory is None else number(memory / 1e6, "{:.3g}")
        rows.append(row)
    return rows


def _speed_details(measured: Measured) -> dict[str, float]:
    details = {f"ideal_decode_{name}": value for name, value in measured["ideal"].items()}
    for one in measured["settings"]:
        setting = f"batch{one['batch_size']}_prompt{one['prompt']}"
        for phase in ("prefill", "decode"):
            for name in ("model", "dense"):
                if one[name] is not None:
                    details[f"{name}_{phase}_{setting}"] = one[name][phase]["tokens_per_second"]
            for name, value in (one[f"{phase}_ratio"] or {}).items():
                details[f"{phase}_ratio_{name}_{setting}"] = value
    return details


SPEED = Section(
    metric="speed",
    title="speed on",
    must_agree=("cpu", "cores", "gpu", "device", "threads", "settings", "new_tokens", "repeats", "warmup"),
    describe=_describe_speed,
    cells=_speed_cells,
    details=_speed_details,
    ascending=False,
    entries=("settings", "ideal"),
)
