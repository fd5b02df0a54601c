"""A published table joined with our records of its recipes: ours, the difference, and where protocols differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pandas as pd

from lowrank_lab.records.results import Results, compression_of
from lowrank_lab.reporting import derived, measured, models_of_papers
from lowrank_lab.reporting.matching import (
    Ours,
    is_cell,
    latest,
    matching,
    method_of,
    named_as_in,
    of_model,
    setting,
    settings_in,
    within,
)
from lowrank_lab.reporting.protocols import differs, marks
from lowrank_lab.reporting.published import Published
from lowrank_lab.reporting.recipe_cells import Cell, recipe_cells

COLUMNS = [
    "model",
    "method",
    "ratio",
    "quantization",
    "metric",
    "dataset",
    "variant",
    "unit",
    "published",
    "note",
    "ours",
    "spread",
    "seeds",
    "difference",
    "our_model",
    "differs",
    "status",
    "keys",
]

FRACTIONS = ("accuracy", "drop", "perplexity_degradation")  # ours; the papers' may be in percent


def join(table: Published, results: Results, methods: Collection[str] = ()) -> pd.DataFrame:
    """Each row of ``table`` with our number, and below them those of our cells that the table does not have.

    A frame with COLUMNS. ``published`` is text as printed, ``ours`` a float in the unit of the row, the mean over
    seeds (``seeds`` of them) with the sample standard deviation as ``spread``; ``difference`` is ours − published.
    ``differs`` says in what our protocol is another than the published one. Where there is no number, ``status``
    says what became of the cell, and is "missing" for one that nobody has run, "left out" with the reason for a
    number that no recipe makes. ``keys`` are those of the records, of one without a number too.
    Ours are measured on the published model where records of it exist, else on one that no paper has (SmolLM2).
    Of runs with other settings the latest counts. Of ``methods`` all records count, not only those of the recipes.
    """
    cells = recipe_cells(table.recipes, results, methods)
    records = [cell.record for cell in cells if cell.record and cell.status == "done"]
    return join_numbers(table, cells, [ours for record in records for ours in _numbers(record, table)])


def join_numbers(table: Published, cells: list[Cell], numbers: list[Ours]) -> pd.DataFrame:
    """The same with ``numbers`` of ours, which are those of ``cells``."""
    numbers = named_as_in(table, numbers)
    rows = [_with_ours(row, table, cells, numbers) for row in dicts(table.rows)]
    rows += _beyond(table, numbers)
    derived.add(rows, table.average)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["difference"] = frame["ours"] - pd.to_numeric(frame["published"].str.replace(",", ""), errors="coerce")
    return frame


def dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(rows.columns, row, strict=True)) for row in rows.itertuples(index=False)]


def _numbers(record: dict[str, Any], table: Published) -> Iterator[Ours]:
    """All numbers of a record; those of the dense model measured with a compressed one as of a dense record.

    Where activations were truncated, and not the weights, the method has the ending ``_activations``.
    """
    for (metric, dataset, variant, value), source in measured.numbers(record):
        protocol = source.get("protocol", {})
        yield Ours(record, metric, dataset, variant, value, protocol, differs(record, metric, source, table))
    truncated = measured.truncated(record)
    for (metric, dataset, variant, value), source in measured.of_truncated_activations(record):
        protocol = source["protocol"]
        yield Ours(truncated, metric, dataset, variant, value, protocol, differs(truncated, metric, source, table))
    config = {**record["config"], "allocation": None, "quantization": None, "compressions": []}
    quantization = {"name": "none", "family": "none"}
    dense = {**record, "method": "dense", "ratio": 1.0, "quantization": quantization}
    dense |= {"config": config, "compressions": {}}
    for (metric, dataset, variant, value), source in measured.of_dense(record):
        protocol = source.get("protocol", {})
        yield Ours(dense, metric, dataset, variant, value, protocol, differs(dense, metric, source, table))


def _with_ours(row: dict[str, Any], table: Published, cells: list[Cell], numbers: list[Ours]) -> dict[str, Any]:
    """A published row as one of the frame."""
    if found := matching(row, numbers, table):
        return _row(row, latest(found), "done")
    ran = [(cell.status, cell.record) for cell in cells if cell.record and is_cell(row, cell.record, table)]
    ran = of_model(row["model"], ran, lambda one: one[1])
    status = ran[0][0] if ran else "missing"
    keys = ran[0][1]["key"] if ran else ""
    if status in ("done", "missing") and (why := table.why_left_out(row)):
        return {**_row(row, [], f"left out ({why})"), "keys": keys}
    return {**_row(row, [], "not measured" if status == "done" else status), "keys": keys}


def _row(row: dict[str, Any], found: list[Ours], status: str) -> dict[str, Any]:
    scale = 100.0 if row["unit"] == "%" and row["metric"] in FRACTIONS else 1.0
    scale = 1000.0 if row["unit"] == "MB" and row["metric"] == "size" else scale
    of_seed = {ours.record["seed"]: ours.value * scale for ours in found}
    record = found[0].record if found else None
    return {
        **{name: row[name] for name in ("model", "method", "ratio", "quantization", "metric", "dataset")},
        **{name: row[name] for name in ("variant", "unit", "note")},
        "published": row["value"],
        **derived.over_seeds(of_seed),
        "our_model": record["model"] if record else "",
        "differs": marks(row["model"], record, found[0].differs) if record else "",
        "status": "done" if found else status,
        "keys": " ".join(sorted({ours.record["key"] for ours in found})),
    }


def _beyond(table: Published, numbers: list[Ours]) -> list[dict[str, Any]]:
    """Our numbers in the table's columns that match none of its rows, such as those of a user's method.

    Of a model that no paper has, these are all our numbers: only those of the same cells match published ones. A
    number of a paper's model that matches a row gets no second line, even where that row shows a later one. A
    setting that the table names for its lines is named for ours too.
    """
    rows = dicts(table.rows)

    def matches(model: str, record: dict[str, Any], metric: str, dataset: str, variant: str) -> bool:
        return any(
            (row["model"], row["metric"], row["dataset"]) == (model, metric, dataset)
            and within(row["variant"], variant)
            and is_cell(row, record, table)
            for row in rows
        )

    columns = {(row["metric"], row["dataset"]): row["unit"] for row in rows}
    named = sorted({name for row in rows for name, _ in settings_in(row["variant"])})
    papers = {path: name for name, path in models_of_papers.paths().items()}
    found: dict[tuple[str, ...], dict[tuple[str, str, str], list[Ours]]] = {}
    for ours in numbers:
        record, where = ours.record, (ours.metric, ours.dataset)
        model = papers.get(record["config"]["model"]["path"], "")
        if where in columns and not (model and matches(model, record, *where, ours.variant)):
            settings = ";".join(f"{name}={setting(record['config'], name)}" for name in _answered(named, record))
            line = (method_of(record), f"{record['ratio']:g}", record["quantization"]["name"], settings)
            of_line = found.setdefault((model or record["model"], *line), {})
            of_line.setdefault((*where, ours.variant), []).append(ours)
    beyond = []
    for (model, method, ratio, quantization, settings), of_line in sorted(found.items(), key=_dense_first):
        shared = {"model": model, "method": method, "ratio": ratio, "quantization": quantization, "note": ""}
        for (metric, dataset), unit in columns.items():
            cell = {**shared, "metric": metric, "dataset": dataset, "unit": unit, "value": ""}
            record = next(iter(of_line.values()))[0].record
            ours_derived = metric == "drop" or dataset == "average"
            if ours_derived and not matches(model, record, metric, dataset, ""):
                beyond.append(_row({**cell, "variant": settings}, [], "missing"))
            for (of_metric, of_dataset, variant), same in of_line.items():
                if (of_metric, of_dataset) == (metric, dataset):
                    both = ";".join(part for part in (settings, variant) if part)
                    beyond.append(_row({**cell, "variant": both}, latest(same), "done"))
    return beyond


def _dense_first(item: tuple[tuple[str, ...], Any]) -> tuple[Any, ...]:
    model, method, ratio, *rest = item[0]
    return model, method != "dense", -float(ratio), method, *rest


def _answered(names: list[str], record: dict[str, Any]) -> list[str]:
    """Those of the settings that have a value in a record's compression; none of the dense model."""
    if not compression_of(record, "lowrank"):
        return []
    return [name for name in names if setting(record["config"], name) != "None"]
