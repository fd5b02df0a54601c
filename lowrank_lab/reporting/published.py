"""Published numbers: a CSV a table in ``references/``, and the catalogue of what the sources hold. No records."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from lowrank_lab.basics.errors import UserError

REFERENCES = Path(__file__).parent / "references"
COLUMNS = ["model", "method", "ratio", "quantization", "metric", "dataset", "unit", "value", "variant", "note"]


@dataclass(frozen=True)
class Published:
    """A table of a source.

    rows      as text, digit by digit, with COLUMNS: one row a number, in the source's order (what COLUMNS mean is
              in references/README.md). Two columns are added: ``number`` (float, nan where there is none) and
              ``kept`` (float, the ratio; nan where there is none)
    recipes   the experiments whose cells are ours
    also      our names of methods, quantizations and data sets by the table's, where they differ
    expected  the protocol as far as known: window, samples, seqlen, calibration
    ratio     that of ours where the source gives none
    average   the tasks of its averages; empty: all that it has
    ours_are  by our name of a method or a metric, in what ours is not the source's
    left_out  which of its numbers no recipe makes: by column the values that they have, and ``why``
    """

    name: str
    title: str
    source: str
    protocol: str
    notes: str
    rows: pd.DataFrame
    recipes: tuple[str, ...]
    also: dict[str, str]
    expected: dict[str, Any]
    ratio: float | None
    average: tuple[str, ...]
    ours_are: dict[str, str]
    left_out: tuple[dict[str, Any], ...]
    waits_for: str | None

    def why_left_out(self, row: Mapping[str, Any]) -> str:
        """Why no recipe makes our number for a row; "" for one that a recipe does make."""
        rules = (rule for rule in self.left_out if all(row[name] in rule[name] for name in rule if name != "why"))
        return next((str(rule["why"]) for rule in rules), "")


@cache
def catalogue() -> dict[str, Any]:
    """references/catalogue.yaml: by source its protocol, tables and figures."""
    found: dict[str, Any] = _yaml((REFERENCES / "catalogue.yaml").read_text(encoding="utf-8"))
    return found


@cache
def method_names() -> dict[str, str]:
    """By our name of a method, the printed one."""
    names: dict[str, str] = _yaml((REFERENCES / "methods.yaml").read_text(encoding="utf-8"))
    return names


def printed(method: str) -> str:
    """The printed name of a method; a user's method has its slug."""
    return method_names().get(method, method)


def tables() -> list[str]:
    """The names of all tables in the catalogue, "dobi/table2", in the sources' order."""
    return [f"{source}/{table}" for source, entry in catalogue().items() for table in entry["tables"]]


def figures() -> list[str]:
    """The names of all figures in the catalogue."""
    return [f"{source}/{figure}" for source, entry in catalogue().items() for figure in entry.get("figures", ())]


def entry(name: str) -> dict[str, Any]:
    """What the catalogue says of a table or figure. Raises UserError for a name that is in no source."""
    source, _, what = name.partition("/")
    for kind in ("tables", "figures"):
        if what in catalogue().get(source, {}).get(kind, {}):
            found: dict[str, Any] = catalogue()[source][kind][what]
            return found
    known = [*tables(), *figures()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}" if near else f"choose one of {', '.join(known)}"
    raise UserError(f"{name}: no such table or figure; {hint}")


def recipes(name: str) -> tuple[str, ...]:
    """The experiments that make ours. Raises UserError for a name that is in no source."""
    return tuple(entry(name).get("recipes", ()))


@cache
def load(name: str) -> Published:
    """The table ``name``, such as "dobi/table2". Raises UserError for one that is not there."""
    facts = entry(name)
    file = REFERENCES / f"{name}.csv"
    if not file.is_file():
        raise UserError(f"{name}: its published numbers are not here; tables are {', '.join(tables())}")
    head, rows = read(file)
    source = catalogue()[name.partition("/")[0]]
    return Published(
        name,
        head["title"],
        head["source"],
        head.get("protocol") or "",
        head.get("notes") or "",
        rows,
        recipes(name),
        {**source.get("also", {}), **facts.get("also", {})},
        {**source["protocol"], **facts.get("protocol", {})},
        facts.get("ratio"),
        tuple(facts.get("average", ())),
        {**source.get("ours_are", {}), **facts.get("ours_are", {})},
        (*source.get("left_out", ()), *facts.get("left_out", ())),
        facts.get("waits_for"),
    )


def read(file: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """The head of a reference file, and its rows as in ``Published``."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    head = _yaml("".join(line[2:] for line in lines if line.startswith("# ")))
    body = io.StringIO("".join(line for line in lines if not line.startswith("# ")))
    rows = pd.read_csv(body, dtype=str, keep_default_na=False)
    if list(rows.columns) != COLUMNS:
        raise ValueError(f"{file.name}: the columns are {list(rows.columns)}, not {COLUMNS}")
    rows["number"] = pd.to_numeric(rows["value"].str.replace(",", ""), errors="coerce")
    rows["kept"] = pd.to_numeric(rows["ratio"], errors="coerce")
    return head, rows


def _yaml(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text))
