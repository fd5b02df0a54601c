"""How much of the sources is here: tables and figures, and which have published numbers, recipes and results."""

from __future__ import annotations

import pandas as pd

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import paper_figures, published
from lowrank_lab.reporting.joined import join
from lowrank_lab.reporting.recipe_cells import recipe_cells


def ran(results: Results) -> dict[str, int]:
    """Of every table and figure, how many of its cells have a record, also of a failed, skipped or outdated one."""
    names = [*published.tables(), *published.figures()]
    found = {name: recipe_cells(published.recipes(name), results) for name in names}
    return {name: sum(cell.record is not None for cell in cells) for name, cells in found.items()}


def coverage(results: Results) -> pd.DataFrame:
    """One row a table or figure: ``published`` (how many numbers), ``recipe``, ``ran``, ``ours``, ``waits for``.

    ``ours`` is how many published numbers of a table are matched by one of ours, and how many points a figure
    would show.
    """
    rows = []
    for name, cells in ran(results).items():
        is_table = name in published.tables()
        ours = (_matched(name, results) if is_table else len(paper_figures.data_of(name, results))) if cells else 0
        rows.append(
            {
                "name": name,
                "kind": "table" if is_table else "figure",
                "published": int((published.load(name).rows["value"] != "").sum()) if is_table else 0,
                "recipe": ", ".join(published.recipes(name)),
                "ran": cells,
                "ours": ours,
                "waits for": _waits_for(name),
            }
        )
    return pd.DataFrame(rows)


def _waits_for(name: str) -> str:
    """What lowrank_lab cannot do yet: of the whole table or figure, and of the numbers that are left out."""
    entry = published.entry(name)
    if name not in published.tables() or not entry.get("recipes"):
        return str(entry.get("waits_for") or "")
    table = published.load(name)
    rows = table.rows[table.rows["value"] != ""].to_dict("records")
    reasons = [entry.get("waits_for"), *(table.why_left_out(row) for row in rows)]
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _matched(name: str, results: Results) -> int:
    joined = join(published.load(name), results)
    return int(((joined["status"] == "done") & (joined["published"] != "")).sum())


def by_source(rows: pd.DataFrame) -> pd.DataFrame:
    """Counts of ``coverage``'s rows: a row for the tables, and one for the figures, of each source."""
    lines = []
    for (source, kind), group in rows.groupby([rows["name"].str.partition("/")[0], "kind"], sort=False):
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
    return pd.DataFrame(lines)


def markdown(results: Results, reached: pd.DataFrame) -> str:
    """The count by source, all of it below, and the faults of ``reached``, which reach.counts() has found.

    Of the numbers of a table ``met`` can be met by cells of its recipes, and ``left out`` have a reason not to be.
    """
    rows = coverage(results)
    for position, what in enumerate(("met", "left out"), list(rows.columns).index("published") + 1):
        rows.insert(position, what, [str(reached[what].get(name, "")) for name in rows["name"]])
    count = by_source(rows).to_markdown(index=False, disable_numparse=True)
    whole = rows.to_markdown(index=False, disable_numparse=True)
    faults = "".join(f"fault: {line}\n" for of_table in reached["faults"] for line in of_table)
    return "\n\n".join(part for part in (count, f"{whole}\n", faults) if part)
