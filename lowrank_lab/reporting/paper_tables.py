"""Published tables with our numbers, as a DataFrame, Markdown, CSV and LaTeX. joined.py has their content."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd

from lowrank_lab.basics.paths import RUN
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import published
from lowrank_lab.reporting.joined import join
from lowrank_lab.reporting.published import Published
from lowrank_lab.reporting.recipe_cells import recipe_cells

LINE = ["ratio", "method", "quantization", "variant"]  # what distinguishes the lines of a table
COLUMN = ["metric", "dataset", "setting"]  # what distinguishes its columns
OF_COLUMN = ("batch", "prompt", "gpu", "linear", "shots")  # variants that belong to a column
HIGHER_IS_BETTER = ("accuracy", "tokens_per_second", "speedup")
OTHER = " †"  # beside the name of a method of ours that is not quite the source's
# Nothing to be best at.
NO_RANK = ("parameters", "parameters_removed", "size", "memory", "flops", "flops_removed", "perplexity_degradation")


def table(name: str, results: str | Path = "results", methods: Collection[str] = ()) -> pd.DataFrame:
    """The published table ``name`` ("dobi/table2") joined with the records below ``results``; see joined.join.

    ``methods`` may name some of your own. Raises UserError for a name that is no table.
    """
    return join(published.load(name), Results(results), methods)


def write(name: str, results: Results, folder: Path) -> list[Path]:
    """Write <source>_<table>.md, .csv and .tex into ``folder``; returns the files."""
    source = published.load(name)
    joined = join(source, results)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        ".md": markdown(source, joined, results),
        ".csv": joined.to_csv(index=False, lineterminator="\n"),
        ".tex": latex(source, joined),
    }
    files = []
    for ending, text in texts.items():
        files.append(folder / f"{name.replace('/', '_')}{ending}")
        files[-1].write_text(text, encoding="utf-8")
    return files


def markdown(source: Published, joined: pd.DataFrame, results: Results) -> str:
    """A table for each published model: of every line what is published, ours, and the difference."""
    parts = [f"# {source.name}: {source.title}", source.source]
    if source.protocol:
        parts.append(f"Published protocol: {source.protocol}")
    if source.notes:
        parts.append(f"Notes: {source.notes}")
    if source.waits_for:
        parts.append(f"Some of it waits for {source.waits_for}.")
    marks = letters(joined)
    for model, rows in joined.groupby("model", sort=False):
        wide = lines(rows, marks, source)
        parts.append(f"## {model}\n\n{wide.to_markdown(index=False, disable_numparse=True)}")
    parts += [f"[{letter}] {text}" for text, letter in marks.items()]
    if any(OTHER in part for part in parts):
        parts += [f"{OTHER.strip()} {text}" for text in dict.fromkeys(source.ours_are.values())]
    parts += [f"- {line}" for line in left_out(joined)]
    parts += [
        f"- {row['method']} {row['ratio']} {_place(row)}: {row['note']}" for _, row in _noted(joined).iterrows()
    ]
    cells = recipe_cells(source.recipes, results)
    parts += [f"- {cell.label}: {cell.status}" for cell in cells if cell.status not in ("done", "missing")]
    if missing := sum(cell.status == "missing" for cell in cells):
        parts.append(f"- {missing} cells of the recipe have not run; its command goes on with them")
    if source.recipes:
        parts.append("Ours: " + " and ".join(f"`{RUN} -m experiment={name}`" for name in source.recipes))
    return "\n\n".join(parts) + "\n"


def lines(rows: pd.DataFrame, marks: dict[str, str], source: Published | None = None) -> pd.DataFrame:
    """The rows of one model as people read them: three lines (published, ours, difference) of a column a number.

    Where nothing is published there is one line, ours; where nothing of ours is there, what became of it stands in
    its place. Columns that say nothing (no quantization, no variant) are left out. Methods of ours that are not
    quite those of the ``source`` have a mark.
    """
    other = source.ours_are if source is not None else {}
    shown = setting_apart(rows)
    filled = [name for name in LINE if name in ("ratio", "method") or (shown[name].replace("none", "") != "").any()]
    found = []
    for key, line in shown.groupby(LINE, sort=False):
        head = {name: str(value) for name, value in zip(LINE, key, strict=True) if name in filled}
        head["method"] = published.printed(head["method"])
        of_line = {
            "published": {column_name(row): row["published"] or "—" for _, row in line.iterrows()},
            "ours": {column_name(row): ours_text(row, marks) for _, row in line.iterrows()},
            "difference": {column_name(row): difference_text(row) for _, row in line.iterrows()},
        }
        for kind, cells in of_line.items():
            empty = all(text == "—" for text in cells.values())
            if not empty or (kind == "published" and (line["published"] != "").any()):
                mark = OTHER if kind == "ours" and line["method"].iloc[0] in other else ""
                found.append({**head, "method": head["method"] + mark, "": kind, **cells})
    columns = [*filled, "", *dict.fromkeys(column_name(row) for _, row in shown.iterrows())]
    return pd.DataFrame(found, columns=columns).fillna("—")


def latex(source: Published, joined: pd.DataFrame) -> str:
    """A booktabs table for each published model (needs booktabs and ulem): best in bold, second underlined.

    Ranked are the methods at one ratio and quantization, published and ours apart, ours by the model that we
    measured; the dense model takes no part.
    """
    parts = []
    for model, rows in joined.groupby("model", sort=False):
        shown = setting_apart(rows)
        wide = lines(rows, {})
        wide = wide[wide[""] != "difference"].reset_index(drop=True)
        emphasis = _emphasis(shown)
        texts = wide.map(_escaped)
        usual = {"quantization": "none", "variant": ""}  # of columns that are left out
        for index in wide.index:
            row = {**usual, **{str(name): str(value) for name, value in wide.loc[index].items()}}
            for column in wide.columns:
                command = emphasis.get((row[""], *(row[name] for name in LINE), column))
                if command:
                    texts.at[index, column] = f"\\{command}{{{texts.at[index, column]}}}"
        others = {published.printed(method): text for method, text in source.ours_are.items()}
        others = {
            name: text for name, text in others.items() if name in set(wide.loc[wide[""] == "ours", "method"])
        }
        for index in wide.index[(wide[""] == "ours") & wide["method"].isin(others)]:
            texts.at[index, "method"] += "$^\\dagger$"
        texts.columns = [_escaped(column) for column in texts.columns]
        alignment = "".join("l" if column in (*LINE, "") else "r" for column in wide.columns)
        caption = _escaped(f"{source.title} ({source.name}, {model}): published and ours")
        caption += "".join(f"; $\\dagger$: {_escaped(text)}" for text in dict.fromkeys(others.values()))
        parts.append(texts.to_latex(index=False, caption=caption, column_format=alignment, escape=False))
    return "\n".join(parts)


def letters(joined: pd.DataFrame) -> dict[str, str]:
    """A letter for each way in which our protocol differs, in the order of the table."""
    texts = [text for text in dict.fromkeys(joined["differs"]) if text]
    return {text: _letter(number) for number, text in enumerate(texts)}


def left_out(joined: pd.DataFrame) -> list[str]:
    """Why no recipe makes some of the published numbers: a line a reason, with what it is true of."""
    rows = joined[joined["status"].str.startswith("left out (")]
    lines = []
    for status, of_reason in rows.groupby("status", sort=False):
        methods = dict.fromkeys(published.printed(method) for method in of_reason["method"])
        models = dict.fromkeys(of_reason["model"])
        reason = str(status).removeprefix("left out (").removesuffix(")")
        what = f"{', '.join(methods)} on {', '.join(models)}"
        lines.append(f"left out: {what} ({len(of_reason)} numbers): {reason}")
    return lines


def ours_text(row: pd.Series, marks: dict[str, str]) -> str:
    """Our number with its spread over seeds and the letter of its protocol; or what became of the cell."""
    if row["status"] != "done":
        state = str(row["status"]).partition(" (")[0]
        return "—" if state in ("missing", "left out") else state
    text = _number(row["ours"], row["metric"], row["unit"])
    if row["seeds"] > 1 and pd.notna(row["spread"]):
        text += f" ± {row['spread']:.2g}"
    return f"{text} [{marks[row['differs']]}]" if row["differs"] in marks else text


def difference_text(row: pd.Series) -> str:
    """Ours − published, with its sign; — where one of them is missing."""
    return "—" if pd.isna(row["difference"]) else f"{row['difference']:+.3g}"


def _number(value: float, metric: str, unit: str) -> str:
    if pd.isna(value):
        return "nan"
    if metric == "accuracy":
        return f"{value:.2f}" if unit == "%" else f"{value:.3f}"
    return f"{value:.4g}"


def setting_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """With the part of the variant that belongs to a column as ``setting``, and the rest as ``variant``."""
    parts = rows["variant"].map(lambda text: [part for part in text.split(";") if part])

    def joined(belongs: Callable[[str], bool]) -> pd.Series:
        return parts.map(lambda found: ", ".join(part for part in found if belongs(part.split("=")[0])))

    setting, variant = joined(lambda name: name in OF_COLUMN), joined(lambda name: name not in OF_COLUMN)
    return rows.assign(setting=setting, variant=variant)


def column_name(row: pd.Series) -> str:
    """A column's name."""
    what = {"perplexity": "", "accuracy": "", "drop": "drop"}.get(row["metric"], row["metric"])
    dataset = "" if (row["metric"], row["dataset"]) == ("drop", "average") else row["dataset"]
    unit = f"({row['unit']})" if row["unit"] else ""
    return " ".join(part for part in (what, dataset, row["setting"], unit) if part).replace("_", " ")


def _place(row: pd.Series) -> str:
    return " ".join(part for part in (row["model"], row["metric"], row["dataset"], row["variant"]) if part)


def _noted(joined: pd.DataFrame) -> pd.DataFrame:
    return joined[joined["note"] != ""]


def _emphasis(shown: pd.DataFrame) -> dict[tuple[str, ...], str]:
    """By line and column, "textbf" for the best and "uline" for the second best."""
    emphasis: dict[tuple[str, ...], str] = {}
    ranked = shown[~shown["metric"].isin(NO_RANK) & (shown["method"] != "dense")]
    for kind in ("published", "ours"):
        values = pd.to_numeric(ranked[kind], errors="coerce")
        ranks = ["ratio", "quantization", *COLUMN, *(["our_model"] if kind == "ours" else [])]
        for _, group in ranked.groupby(ranks, sort=False):
            metric = group["metric"].iloc[0]
            order = (
                values[group.index].dropna().sort_values(ascending=metric not in HIGHER_IS_BETTER, kind="stable")
            )
            distinct = list(dict.fromkeys(order))
            for command, value in zip(("textbf", "uline"), distinct if len(distinct) > 1 else [], strict=False):
                for index in order[order == value].index:
                    row = shown.loc[index]
                    line = {**{name: str(row[name]) for name in LINE}, "method": published.printed(row["method"])}
                    place = (kind, *line.values(), column_name(row))
                    emphasis[place] = command
    return emphasis


def _escaped(text: str) -> str:
    return re.sub(r"[_&%#$]", r"\\\g<0>", str(text)).replace("±", r"$\pm$").replace("—", "---")


def _letter(number: int) -> str:
    """a, b, …, z, aa, ab, …"""
    return ("" if number < 26 else _letter(number // 26 - 1)) + chr(ord("a") + number % 26)
