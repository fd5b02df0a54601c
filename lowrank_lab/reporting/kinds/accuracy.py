"""Accuracies of lm-eval tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Measured, Section, number


def _describe_accuracy(protocol: Mapping[str, Any]) -> str:
    names = ", ".join(protocol["tasks"])
    shots = f"{protocol['shots']} shots" if isinstance(protocol["shots"], int) else "few-shot as the tasks say"
    limit = "" if protocol["limit"] is None else f", the first {protocol['limit']} documents of each"
    return f"{names}: {shots}{limit}, lm-eval {protocol['harness']}"


def _accuracy_cells(measured: Measured) -> dict[str, str]:
    """A column a task, its number ± standard error; of a group also its groups; and the mean of several tasks."""

    def cell(one: Mapping[str, Any]) -> str:
        error = one["stderr"]
        return number(one["value"], "{:.4f}") + ("" if error is None else f" ± {error:.4f}")

    cells = {}
    for name, task in measured["tasks"].items():
        cells[name if task["metric"] in ("acc", None) else f"{name} ({task['metric']})"] = cell(task)
        for group in task.get("groups", {}).get(name, []):
            found = task["results"][group]
            if group in task["groups"]:
                value, error = (found[of].get(task["metric"]) for of in ("metrics", "stderr"))
                cells[group] = cell({"value": value, "stderr": error})
    return {**cells, "mean": cell(measured)} if len(measured["tasks"]) > 1 else cells


def _accuracy_details(measured: Measured) -> dict[str, float]:
    """All metrics of every task, and of every group and member within it, and their standard errors."""
    details = {}
    for task in measured["tasks"].values():
        for name, found in task.get("results", {}).items():
            for metric, value in found["metrics"].items():
                details[f"{name} {metric}"] = value
                if (error := found["stderr"].get(metric)) is not None:
                    details[f"{name} {metric} stderr"] = error
    return details


ACCURACY = Section(
    metric="accuracy",
    title="accuracy on",
    must_agree=("tasks", "shots", "limit", "harness", "data"),
    describe=_describe_accuracy,
    cells=_accuracy_cells,
    details=_accuracy_details,
    ascending=False,
    alike=True,
    entries=("tasks",),
)
