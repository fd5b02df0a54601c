"""How much of the sources is here: tables and figures, and which have published numbers, recipes and results."""

from __future__ import annotations

import pandas as pd

from lowrank_lab.reporting import published
from lowrank_lab.reporting.joined import experiment_of
from lowrank_lab.reporting.tables import outdated
from lowrank_lab.results import Results


def coverage(results: Results) -> pd.DataFrame:
    """One row a table or figure: ``published`` (its numbers), ``recipe``, cells that ``ran`` and are ``done``,
    ``waits for``.

    Ran is what has a record, be it of a failed, skipped or outdated cell. A table counts as measured once a cell of
    one of its recipes is done.
    """
    known = {record["key"]: record for record in results.records()}
    finished = {key for key, record in known.items() if record["status"] == "done" and not outdated(record)}
    asked: dict[str | None, set[str]] = {}
    for grid in results.grids():
        asked.setdefault(experiment_of(grid["name"]), set()).update(grid["cells"])
    rows = []
    for name in [*published.tables(), *published.figures()]:
        facts = published.entry(name)
        recipes = published.recipes(name)
        cells = set().union(*(asked.get(recipe, set()) for recipe in recipes))
        is_table = name in published.tables()
        rows.append(
            {
                "name": name,
                "kind": "table" if is_table else "figure",
                "published": int((published.load(name).rows["value"] != "").sum()) if is_table else 0,
                "recipe": ", ".join(recipes),
                "ran": len(cells & known.keys()),
                "done": len(cells & finished),
                "waits for": facts.get("waits_for") or "",
            }
        )
    return pd.DataFrame(rows)


def markdown(results: Results) -> str:
    """The count by source, and all of it below."""
    rows = coverage(results)
    rows["source"] = rows["name"].str.partition("/")[0]
    lines = []
    for (source, kind), group in rows.groupby(["source", "kind"], sort=False):
        lines.append(
            {
                "source": source,
                "of results": f"{len(group)} {kind}s",
                "published numbers": f"{(group['published'] > 0).sum()} ({group['published'].sum()} numbers)"
                if kind == "table"
                else "figures have none",
                "recipes": int((group["recipe"] != "").sum()),
                "results here": int((group["done"] > 0).sum()),
                "waiting": int((group["waits for"] != "").sum()),
            }
        )
    count = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return f"{count}\n\n{rows.drop(columns='source').to_markdown(index=False, disable_numparse=True)}\n"
