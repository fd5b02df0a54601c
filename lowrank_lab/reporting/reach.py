"""Which published numbers of a table the cells of its recipes can meet, and which are left out for a reason."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lowrank_lab.process import progress
from lowrank_lab.reporting import published
from lowrank_lab.reporting.joined import dicts, join_numbers
from lowrank_lab.reporting.matching import Ours, apart_from_seed, matching, named_as_in
from lowrank_lab.reporting.promised import promised
from lowrank_lab.reporting.published import Published

MET, LEFT_OUT = "met", "left out"
PLACE = ["model", "method", "ratio", "quantization", "metric", "dataset", "variant"]


def counts() -> pd.DataFrame:
    """One row a table, by its name: how many of its numbers are ``met``, ``left out``, and ``faults``.

    The faults are lines that name each number that is neither. A table without a recipe leaves all of them out.
    """
    rows = {}
    for name in progress.track(published.tables(), "recipes", "table"):
        table = published.load(name)
        if not table.recipes:
            left_out = int((table.rows["value"] != "").sum())
            rows[name] = {"met": 0, "left out": left_out, "faults": []}
            continue
        found = reach(table)
        wrong = found[~found["reach"].isin((MET, LEFT_OUT))]
        faults = [f"{name}: {' '.join(filter(None, row[PLACE]))}: {row['reach']}" for _, row in wrong.iterrows()]
        faults += [f"{name}: no number is left out because of: {why}" for why in idle(table, found)]
        of_reach = found["reach"].value_counts()
        rows[name] = {**{what: int(of_reach.get(what, 0)) for what in (MET, LEFT_OUT)}, "faults": faults}
    return pd.DataFrame.from_dict(rows, orient="index")


def idle(table: Published, found: pd.DataFrame) -> list[str]:
    """The reasons of a table's own in the catalogue that leave no number of it out."""
    own = published.entry(table.name).get("left_out", ())
    return [rule["why"] for rule in own if rule["why"] not in set(found.loc[found["reach"] == LEFT_OUT, "why"])]


def reach(table: Published) -> pd.DataFrame:
    """The published numbers of ``table``, with ``reach``: "met", "left out", or what is wrong.

    A number is met where the recipes' cells have exactly one number of the same quantity, or where it follows from
    such ones. It is left out where no cell has one and the catalogue says ``why``.
    """
    numbers = [ours for recipe in table.recipes for ours in promised(recipe)]
    frame = join_numbers(table, [], numbers)
    frame = frame[frame["published"] != ""].copy()
    named = named_as_in(table, numbers)
    rows = [row for row in dicts(table.rows) if row["value"] != ""]
    frame["why"] = [table.why_left_out(row) for row in rows]
    frame["reach"] = [
        _reach(done, why, matching(row, named, table))
        for done, why, row in zip(frame["status"] == "done", frame["why"], rows, strict=True)
    ]
    return frame


def _reach(done: bool, why: str, found: list[Ours]) -> str:
    if len({apart_from_seed(ours) for ours in found}) > 1:
        return f"{len(found)} of ours would stand here: {', '.join(sorted({_cell(ours) for ours in found}))}"
    if done:
        return MET if not why else "met, although the catalogue leaves it out"
    return LEFT_OUT if why else "no cell of the recipe has it"


def _cell(ours: Ours) -> str:
    record: dict[str, Any] = ours.record
    return f"{record['method']} {record['ratio']:g} {record['quantization']['name']} {ours.variant}".strip()
