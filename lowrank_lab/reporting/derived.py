"""What a published table derives from its numbers, from ours: averages of accuracies, drops, and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import pandas as pd

# Of a number and that of another method, as the slides print them: per cent less, per cent more, the difference.
COMPARISONS: dict[str, Callable[[list[float]], float]] = {
    "drop": lambda values: 100 * (values[1] - values[0]) / values[1],
    "gain": lambda values: 100 * (values[0] - values[1]) / values[1],
    "accuracy_difference": lambda values: values[0] - values[1],
}


def over_seeds(of_seed: dict[int, float]) -> dict[str, Any]:
    """A number's columns from its values by seed. The mean over seeds of which one is nan is nan."""
    values = pd.Series(list(of_seed.values()), dtype=float)
    mean, spread = values.mean(skipna=False), values.std(skipna=False)
    return {"ours": mean, "spread": spread, "seeds": len(values), "of_seed": of_seed}


def add(rows: list[dict[str, Any]], of_average: Collection[str] = ()) -> None:
    """Averages over the accuracies of a line of the table, and relative drops of averages, from ours.

    ``of_average`` are the tasks of the averages; empty: all that the table has.
    They are taken by seed where all parts have the same seeds, and from the means, without a spread, where not.
    No average goes over accuracies of different models.
    """
    tasks = {row["dataset"] for row in rows if row["metric"] == "accuracy" and row["dataset"] != "average"}
    tasks = set(of_average) or tasks
    for row in rows:
        if row["dataset"] == "average" and row["metric"] == "accuracy" and row["status"] != "done":
            of_line = [r for r in rows if _line(r) == _line(row) and r["metric"] == "accuracy"]
            parts = [r for r in of_line if r["dataset"] in tasks]
            of_one_model = len({part["our_model"] for part in parts}) == 1
            if len(parts) == len(tasks) and of_one_model and all(part["status"] == "done" for part in parts):
                _derive(row, parts, lambda values: sum(values) / len(values))
    averages = [
        r for r in rows if r["dataset"] == "average" and r["metric"] == "accuracy" and r["status"] == "done"
    ]
    for row in rows:
        if (row["metric"], row["dataset"]) == ("drop", "average"):
            average = [r for r in averages if _line(r) == _line(row)]
            dense = [r for r in averages if r["model"] == row["model"] and r["method"] == "dense"]
            dense = [r for r in dense if r["quantization"] == "none"]
            dense = [r for r in dense if r["our_model"] == average[0]["our_model"]] if average else []
            if average and dense:
                _derive(row, average[:1], partial(_drop, dense[0]["ours"], 100.0 if row["unit"] == "%" else 1.0))
    for row in rows:
        if row["variant"].startswith("against="):
            _compare(row, rows)


def _compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Fill a row that compares a number of its line with that of another method, named in its variant."""
    other = row["variant"].partition("=")[2]
    metric = "perplexity" if (row["metric"] == "drop" and row["dataset"] != "average") else "accuracy"
    place = {"metric": metric, "dataset": row["dataset"], "variant": ""}
    place |= {name: row[name] for name in ("model", "ratio", "quantization")}
    parts = [
        found
        for method in (row["method"], other)
        for found in rows
        if found["status"] == "done"
        and all(found[name] == value for name, value in {**place, "method": method}.items())
    ]
    if len(parts) == 2 and parts[0]["our_model"] == parts[1]["our_model"]:
        _derive(row, parts, COMPARISONS[row["metric"]])


def _derive(row: dict[str, Any], parts: list[dict[str, Any]], of: Callable[[list[float]], float]) -> None:
    """Fill ``row`` with what ``of`` makes of the values of ``parts``, and with the marks and keys of them all."""
    seeds = parts[0]["of_seed"]
    if all(part["of_seed"].keys() == seeds.keys() for part in parts):
        row.update(over_seeds({seed: of([part["of_seed"][seed] for part in parts]) for seed in seeds}))
    else:
        row.update(ours=of([part["ours"] for part in parts]), spread=float("nan"), seeds=1)
    texts = [text for part in parts for text in part["differs"].split("; ") if text]
    keys = sorted({key for part in parts for key in part["keys"].split()})
    row.update(differs="; ".join(dict.fromkeys(texts)), keys=" ".join(keys))
    row.update(our_model=parts[0]["our_model"], status="done")


def _drop(whole: float, scale: float, values: list[float]) -> float:
    return (whole - values[0]) / whole * scale


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "method", "ratio", "quantization", "variant"))
