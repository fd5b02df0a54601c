"""How much of the sources is here: tables and figures, and which have published numbers, recipes and results."""

from __future__ import annotations

import pandas as pd

from lowrank_lab.reporting import paper_figures, published
from lowrank_lab.reporting.joined import experiment_of, join
from lowrank_lab.results import Results


def coverage(results: Results) -> pd.DataFrame:
    """One row a table or figure: ``published`` (how many numbers), ``recipe``, ``ran``, ``ours``, ``waits for``.

    ``ran`` is how many of its cells have a record, be it of a failed, skipped or outdated one; ``ours`` how many
    published numbers of a table have one of ours beside them, and of a figure how many points it would show.
    """
    known = {record["key"]: record for record in results.records()}
    asked: dict[str | None, set[str]] = {}
    for grid in results.grids():
        asked.setdefault(experiment_of(grid["name"]), set()).update(grid["cells"])
    rows = []
    for name in [*published.tables(), *published.figures()]:
        facts = published.entry(name)
        recipes = published.recipes(name)
        cells = set().union(*(asked.get(recipe, set()) for recipe in recipes))
        ran, is_table = len(cells & known.keys()), name in published.tables()
        ours = (_beside(name, results) if is_table else len(paper_figures.data_of(name, results))) if ran else 0
        rows.append(
            {
                "name": name,
                "kind": "table" if is_table else "figure",
                "published": int((published.load(name).rows["value"] != "").sum()) if is_table else 0,
                "recipe": ", ".join(recipes),
                "ran": ran,
                "ours": ours,
                "waits for": facts.get("waits_for") or "",
            }
        )
    return pd.DataFrame(rows)


def _beside(name: str, results: Results) -> int:
    joined = join(published.load(name), results)
    return int(((joined["status"] == "done") & (joined["published"] != "")).sum())


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
                "results here": int((group["ours"] > 0).sum()),
                "waiting": int((group["waits for"] != "").sum()),
            }
        )
    count = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return f"{count}\n\n{rows.drop(columns='source').to_markdown(index=False, disable_numparse=True)}\n"
