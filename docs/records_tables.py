"""Tables of these pages that are made from the records in results/small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import coverage, keep, tables
from lowrank_lab.reporting.recipe_cells import recipe_cells

RESULTS = Path(__file__).resolve().parent.parent / "results" / "small"
NOTHING = "—"  # a cell that has not run


def write_tables(folder: Path) -> None:
    """Write each table as Markdown into ``folder``, for pages to include."""
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(RESULTS)
    made = {
        "methods_measured": by_method(results),
        "quantization_measured": by_quantization(results),
        "experiments_kept": keep.summary(results),
        "sources": coverage.by_source(coverage.coverage(results)),
    }
    for name, table in made.items():
        text = table.to_markdown(index=False, disable_numparse=True) if len(table) else "(not run yet)"
        (folder / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")


def by_method(results: Results) -> pd.DataFrame:
    """The perplexities and sizes of experiment=methods, a row a method, the best at 0.8 first."""
    found = _perplexities(results, "methods")
    if found.empty:
        return found
    rows = found.pivot_table(index="method", columns="ratio", values=["perplexity", "MB"], aggfunc="first")
    rows = rows.sort_values(("perplexity", 0.8), key=lambda values: values.fillna(float("inf")))
    dense = found[found["method"] == "dense"]["perplexity"].max()
    shown = pd.DataFrame({"method": [f"`{name}`" for name in rows.index]})
    for ratio in (0.8, 0.6):
        shown[f"perplexity at {ratio}"] = [_number(value) for value in rows["perplexity"][ratio]]
        shown[f"MB at {ratio}"] = [_number(value, ".0f") for value in rows["MB"][ratio]]
    shown["the ratio counts"] = [found[found["method"] == name]["counts"].iloc[0] for name in rows.index]
    first = pd.DataFrame([{"method": "dense", "perplexity at 0.8": _number(dense)}])
    return pd.concat([first, shown[shown["method"] != "`dense`"]]).fillna("")


def by_quantization(results: Results) -> pd.DataFrame:
    """The perplexities of experiment=quantization, with the bits kept for each weight of the dense linears."""
    found = _perplexities(results, "quantization")
    if found.empty:
        return found
    found["shown"] = [
        f"{_number(row.perplexity)} ({row.bits:.2f})" if row.bits < 16 else _number(row.perplexity)
        for row in found.itertuples()
    ]
    rows = found.pivot_table(index="quantization", columns="method", values="shown", aggfunc="first", sort=False)
    order = found.drop_duplicates("quantization").sort_values("bits", ascending=False)["quantization"]
    rows = rows.reindex(index=order, columns=["dense", "svdllm"]).fillna(NOTHING).reset_index()
    return rows.rename(columns={"quantization": "weights", "svdllm": "`svdllm` at 0.8"})


def _perplexities(results: Results, experiment: str) -> pd.DataFrame:
    records = [cell.record for cell in recipe_cells((experiment,), results) if cell.status == "done"]
    return pd.DataFrame([_row(record) for record in records if record is not None])


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": record["method"],
        "ratio": record["ratio"],
        "quantization": record["quantization"]["name"],
        "counts": record["counts"]["unit"],
        "perplexity": record["metrics"]["ppl"]["value"],
        "MB": record["sizes"]["bytes"] / 1e6,
        "bits": tables.bits(record),
    }


def _number(value: float, form: str = ".4g") -> str:
    return NOTHING if pd.isna(value) else format(value, form)
