"""The table method × ratio, from records alone, as a DataFrame and as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab.results import frame

# What must agree for two perplexities to stand in one table.
PROTOCOL = ("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos")
# Where two cells of one method may differ; shown as the variant of the row where they do.
VARIANT_KEYS = ("metric", "allocation", "storage", "calibration", "dtype", "seed")


def comparison(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a finished perplexity, sorted for reading: by group, then method, then falling ratio.

    ``group`` numbers the sets of rows that are comparable: same model and same protocol.
    """
    done = [record for record in records if record["status"] == "done"]
    rows = frame(done)
    if rows.empty:
        return rows
    rows = rows[rows["metric"] == "perplexity"].copy()
    rows["variant"] = rows["key"].map(_variants(done))
    rows["protocol_text"] = rows["protocol"].map(describe)
    identity = rows["model"] + rows["protocol"].map(lambda protocol: str([protocol[k] for k in PROTOCOL]))
    rows["group"] = pd.factorize(identity, sort=True)[0]
    rows["_dense_first"] = rows["method"] != "dense"
    order = ["group", "_dense_first", "method", "variant", "ratio"]
    rows = rows.sort_values(order, ascending=[True, True, True, True, False], kind="stable")
    return rows.drop(columns="_dense_first").reset_index(drop=True)


def describe(protocol: dict[str, Any]) -> str:
    """A protocol in one line, for captions."""
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    return f"{protocol['dataset']} {protocol['split']}, {protocol['documents']} documents, {windows}{bos}"


def groups(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The comparable sets of ``comparison``, each with its caption."""
    if rows.empty:
        return
    for _, group in rows.groupby("group", sort=True):
        first = group.iloc[0]
        yield f"{first['model']}, perplexity on {first['protocol_text']}", group


def presentable(group: pd.DataFrame) -> pd.DataFrame:
    """The columns that people read, as text."""
    table = pd.DataFrame(
        {
            "method": group["method"],
            "variant": group["variant"],
            "ratio": group["ratio"].map("{:g}".format),
            "reached": group["ratio_reached"].map("{:.4f}".format),
            "perplexity": group["value"].map("{:.4g}".format),
            "parameters (M)": (group["parameters"] / 1e6).map("{:.1f}".format),
            "size (MB)": (group["bytes"] / 1e6).map("{:.1f}".format),
            "compression (s)": group["compression_seconds"].map("{:.0f}".format),
            "evaluation (s)": group["evaluation_seconds"].map("{:.0f}".format),
        }
    )
    return table.drop(columns="variant") if (group["variant"] == "").all() else table


def markdown(records: list[dict[str, Any]]) -> str:
    """Every comparable set as a Markdown table, and below them the cells that have no number."""
    parts = []
    for caption, group in groups(comparison(records)):
        parts.append(f"**{caption}**\n\n{presentable(group).to_markdown(index=False, disable_numparse=True)}")
    unfinished = [r for r in records if r["status"] != "done"]
    if unfinished:
        lines = [f"- {r['label']}: {r['status']} ({r['reason']})" for r in unfinished]
        parts.append("**Cells without a number**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def latex(records: list[dict[str, Any]]) -> str:
    """Every comparable set as a booktabs table (needs \\usepackage{booktabs})."""
    parts = []
    for caption, group in groups(comparison(records)):
        table = presentable(group)
        escaped = caption.replace("_", r"\_")
        alignment = "".join("l" if column in ("method", "variant") else "r" for column in table)
        parts.append(table.to_latex(index=False, caption=escaped, column_format=alignment, escape=True))
    return "\n".join(parts)


def csv(records: list[dict[str, Any]]) -> str:
    """All rows with full precision, a column for each part of the protocol."""
    rows = comparison(records)
    if rows.empty:
        return ""
    protocol = pd.DataFrame(list(rows["protocol"])).add_prefix("protocol_")
    rows = rows.drop(columns=["protocol", "protocol_text", "reason", "evaluator"])
    return pd.concat([rows, protocol], axis=1).to_csv(index=False)


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write table.md, table.csv and table.tex; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in (("md", markdown(records)), ("csv", csv(records)), ("tex", latex(records))):
        file = folder / f"table.{name}"
        file.write_text(text)
        files.append(file)
    return files


def _variants(records: list[dict[str, Any]]) -> dict[str, str]:
    """For each record key the settings in which the cells of one method differ, as text; "" where none do."""
    by_method: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for record in records:
        settings: dict[str, Any] = {}
        if record["method"] != "dense":
            for key in VARIANT_KEYS:
                _flatten(key, record["config"][key], settings)
        by_method.setdefault(record["method"], []).append((record["key"], settings))
    variants = {}
    for cells in by_method.values():
        names = sorted({name for _, settings in cells for name in settings})
        differing = [n for n in names if len({str(settings.get(n)) for _, settings in cells}) > 1]
        for key, settings in cells:
            variants[key] = ", ".join(f"{n.split('.')[-1]}={settings[n]}" for n in differing if n in settings)
    return variants


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        into[prefix] = value
        return
    for name, inner in value.items():
        # Of a data set its name says enough; batch sizes change no number.
        if (prefix.endswith(".dataset") and name != "name") or name == "batch_size":
            continue
        _flatten(f"{prefix}.{name}", inner, into)
