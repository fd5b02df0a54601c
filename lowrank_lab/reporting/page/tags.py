"""Under which values of the page's filters a row or a figure is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from lowrank_lab.reporting import published
from lowrank_lab.reporting.measured import PTB
from lowrank_lab.reporting.page.table import Row, ratio_tag
from lowrank_lab.reporting.tables import present

# By the name in the address, what people read.
FILTERS = {
    "model": "model",
    "dataset": "data set",
    "method": "method",
    "ratio": "ratio",
    "quantization": "quantization",
    "variant": "variant",
}
NONE = "none"  # no ratio in a published line, no quantization, nothing but the method
LABEL = r"(\S+)(?: ratio=([\d.e-]+))?(?: (.+))? (\S+) (\S+)"  # method, ratio, what else is told, model, data set

Tags = dict[str, list[str]]


def of_record(record: dict[str, Any]) -> Tags:
    """Of all that a record measured; ``of_measurement`` of one."""
    measured = [name for found in record["metrics"].values() for name in datasets(found.get("protocol") or {})]
    settings = {name: value for name, value in record["variant"].items() if name != "quantization"}
    return {
        "model": [record["model"]],
        "dataset": list(dict.fromkeys([*measured, _usual(record["dataset"])])),
        "method": [record["method"]],
        "ratio": [ratio_tag(record["ratio"])],
        "quantization": [record["quantization"]["name"]],
        "variant": [f"{name}={value}" for name, value in settings.items()] or [NONE],
    }


def of_measurement(record: dict[str, Any], row: pd.Series) -> Tags:
    """Of a row of ``tables.comparison``: its own data sets alone, and the settings by which its table tells it."""
    told = {name: value for name, value in present(row["told"]).items() if name != "quantization"}
    variant = [f"{name}={value}" for name, value in told.items()] or [NONE]
    found = {**of_record(record), "variant": variant}
    return {**found, "dataset": datasets(row["protocol"]) or found["dataset"]}


def of_label(label: str, quantizations: Iterable[str]) -> Tags:
    """Of a cell that has not run, of which there is its label alone; ``quantizations`` are those of other cells."""
    method, ratio, told, model, dataset = parts(label)
    return {
        "model": [model],
        "dataset": [_usual(dataset)],
        "method": [method],
        "ratio": [ratio],
        "quantization": [name for name in quantizations if f" {name} " in f" {told} "] or [NONE],
    }


def parts(label: str) -> tuple[str, str, str, str, str]:
    """Method, ratio, what else is told, model and data set; a label of another form is all method."""
    found = re.fullmatch(LABEL, label)
    method, ratio, told, model, dataset = found.groups(default="") if found else (label, "", "", "—", "—")
    return method, ratio_tag(ratio or 1), told, model, dataset


def datasets(protocol: dict[str, Any]) -> list[str]:
    """What a measurement is on: the text of a perplexity, or tasks."""
    return [_usual(protocol["dataset"])] if "dataset" in protocol else list(protocol.get("tasks") or ())


def _usual(dataset: str) -> str:
    """As published tables name it."""
    return PTB.get(dataset, dataset)


def of_columns(data: pd.DataFrame) -> Tags:
    """Of a paper's figure, by the columns that its data has: no other filter can say that it is not meant."""
    names = [name for name in ("model", "dataset", "method", "ratio") if name in data]
    return {
        name: [ratio_tag(value) if name == "ratio" else value for value in data[name].unique()] for name in names
    }


def union(found: Iterable[Tags]) -> Tags:
    together: Tags = {}
    for tags in found:
        for name, values in tags.items():
            together[name] = list(dict.fromkeys([*together.get(name, []), *values]))
    return together


def filters(rows: list[Row]) -> dict[str, list[tuple[str, str]]]:
    """By filter, the values that some row has, each with what people read; none that would leave all rows."""
    names = published.method_names()

    def values(what: str) -> list[str]:
        return sorted(
            {value for row in rows for value in row.tags.get(what, ())}, key=lambda text: (text.lower(), text)
        )

    def first(of: list[str], one: str) -> list[str]:
        return [*(value for value in of if value == one), *(value for value in of if value != one)]

    ratios = sorted(set(values("ratio")) - {NONE}, key=float, reverse=True)
    found = {
        "model": [(model, model) for model in values("model")],
        "dataset": [(dataset, dataset.replace("_", " ")) for dataset in values("dataset")],
        "method": [(m, f"{names[m]} ({m})" if m in names else m) for m in first(values("method"), "dense")],
        "ratio": [(ratio, ratio) for ratio in [*ratios, *(set(values("ratio")) & {NONE})]],
        "quantization": [(name, name) for name in first(values("quantization"), NONE)],
        "variant": [(v, "as the method has it" if v == NONE else v) for v in first(values("variant"), NONE)],
    }
    return {what: of_what for what, of_what in found.items() if len(of_what) > 1}
