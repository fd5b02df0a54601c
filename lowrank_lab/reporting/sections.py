"""How each kind of measurement is shown: one ``Section`` a metric, which tables and figures go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]  # what an evaluator returned: metric, value, protocol and more


@dataclass(frozen=True)
class Section:
    """One kind of measurement in reports.

    metric        the evaluators' ``metric`` that it shows
    title         what stands in captions: "<model>, <title> <describe(protocol)>"
    must_agree    the entries of the protocol that must agree for two numbers to stand in one table
    describe      the protocol in one line
    cells         the measurement's columns as people read them, in order
    details       its numbers in full precision, by the name of their column in the CSV, beside ``value``
    ascending     whether the lowest value ranks first
    """

    metric: str
    title: str
    must_agree: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], str]
    cells: Callable[[Measured], dict[str, str]]
    details: Callable[[Measured], dict[str, float]] = lambda measured: {}
    ascending: bool = True


def number(value: float | None, form: str = "{:.4g}") -> str:
    """A number as text; nan for the None of a model whose logits are not finite."""
    return "nan" if value is None else form.format(value)


def _describe_perplexity(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    return f"{protocol['dataset']} {protocol['split']}, {protocol['documents']} documents, {windows}{bos}"


PERPLEXITY = Section(
    metric="perplexity",
    title="perplexity on",
    must_agree=("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos"),
    describe=_describe_perplexity,
    cells=lambda measured: {"perplexity": number(measured["value"])},
)


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
)

SECTIONS = (PERPLEXITY, ACCURACY)
