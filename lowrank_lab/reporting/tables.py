"""The table method × ratio, from records alone, as a DataFrame and as Markdown, CSV and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import TextWrapper, fill
from typing import Any

import pandas as pd

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.cells import versions
from lowrank_lab.cells.options import default
from lowrank_lab.models.source import names_gguf
from lowrank_lab.records.labels import word
from lowrank_lab.records.results import other_compressions
from lowrank_lab.reporting.fitting import as_markdown, fitted
from lowrank_lab.reporting.frame import frame
from lowrank_lab.reporting.section import Section
from lowrank_lab.reporting.sections import PERPLEXITY, section_of, sections_of


def comparison(records: list[dict[str, Any]], section: Section = PERPLEXITY) -> pd.DataFrame:
    """One row a finished measurement, ranked: by group, dense first, then by falling ratio and from the best.

    ``group`` numbers the sets of rows that are comparable (same model content and protocol), ``identity`` is
    a hash of what they share, and ``measured`` is all that the evaluator returned. ``variant`` says in what a row
    differs from its method as published or from the other rows of its method, ``told`` the same by setting,
    ``whole`` whether its ratio counts all linears. Records of other component versions are left out.
    """
    done = {r["key"]: r for r in records if r["status"] == "done" and not outdated(r)}
    rows = frame(list(done.values()))
    if rows.empty:
        return rows
    rows = rows[rows["evaluator"].notna()].copy()
    rows["measured"] = [
        done[key]["metrics"][name] for key, name in zip(rows["key"], rows["evaluator"], strict=True)
    ]
    rows = rows[[section_of(measured) == section for measured in rows["measured"]]].copy()
    if rows.empty:
        return pd.DataFrame()
    rows["protocol"] = [protocol or {} for protocol in rows["protocol"]]
    rows["protocol_text"] = rows["protocol"].map(section.describe)
    model = rows["key"].map(lambda key: done[key]["content"]["model"])
    rows["identity"] = [
        fingerprint([name, content, *_must_agree(section, evaluator, protocol)])
        for name, content, evaluator, protocol in zip(
            rows["model"], model, rows["evaluator"], rows["protocol"], strict=True
        )
    ]
    # One measurement may be in several records (another task was added to the job), and twice in one.
    rows["same"] = [
        fingerprint([done[key]["method"], done[key]["ratio"], done[key]["settings"], measured])
        for key, measured in zip(rows["key"], rows["measured"], strict=True)
    ]
    rows = rows.drop_duplicates(["same", "identity"]).drop(columns="same")
    order = rows["model"] + rows["protocol_text"] + rows["identity"]
    rows["group"] = pd.factorize(order, sort=True)[0]
    rows["told"] = None
    for _, group in rows.groupby("group"):
        rows.loc[group.index, "told"] = group["key"].map(told([done[key] for key in group["key"]]))
    rows["variant"] = rows["told"].map(in_words)
    rows["counted"] = rows["key"].map(lambda key: done[key]["counts"]["unit"])
    rows["whole"] = rows["key"].map(lambda key: done[key]["counts"]["whole"])
    rows["bits"] = rows["key"].map(lambda key: bits(done[key]))
    rows["quantized"] = rows["key"].map(lambda key: done[key]["quantization"]["family"])
    rows["others"] = rows["key"].map(lambda key: other_compressions(done[key]))
    rows["value"] = pd.to_numeric(rows["value"], errors="coerce")
    rows["_dense_first"] = rows["method"] != "dense"
    rows["_whole_first"] = ~rows["whole"]  # a ratio of a part of the model means less
    order_of_rows = ["group", "_dense_first", "_whole_first", "ratio", "value", "method", "variant"]
    rising = [section.ascending if name == "value" else name != "ratio" for name in order_of_rows]
    rows = rows.sort_values(order_of_rows, ascending=rising, kind="stable")
    return rows.drop(columns=["_dense_first", "_whole_first"]).reset_index(drop=True)


def _must_agree(section: Section, evaluator: str, protocol: dict[str, Any]) -> list[Any]:
    """What two measurements must share to be comparable."""
    if section.must_agree is None:
        return [evaluator, protocol]
    return [protocol[name] for name in section.must_agree]


def bits(record: dict[str, Any]) -> float:
    """How many bits are kept for each weight of the dense linears: ratio times bits, with scales and the like."""
    sites = record["sizes"]["sites"]
    if not sites["count"]:  # the dense model as it is
        return 32.0 if record["config"]["dtype"] == "float32" else 16.0
    return 8 * sites["bytes"] / sites["parameters_dense"]


def outdated(record: dict[str, Any]) -> bool:
    """Whether a record was made by other versions of its components than the present ones."""
    present, made_by = versions.current(), record.get("components", {"none": 0})
    if any(version != present.get(name) for name, version in made_by.items()):
        return True
    return not {"GGUF", "ONNX"} & made_by.keys() and names_gguf(record["config"]["model"]["path"])


def is_dense(rows: pd.DataFrame) -> pd.Series:
    """Which rows of ``comparison`` are the dense model as it is."""
    return (rows["method"] == "dense") & (rows["quantized"] == "none") & (rows["others"] == "")


def groups(records: list[dict[str, Any]], section: Section) -> Iterator[tuple[str, pd.DataFrame]]:
    """The comparable sets of ``comparison``, each with its caption."""
    rows = comparison(records, section)
    if rows.empty:
        return
    for _, group in rows.groupby("group", sort=True):
        first = group.iloc[0]
        yield f"{first['model']}, {section.title} {first['protocol_text']}", group


def all_groups(records: list[dict[str, Any]]) -> Iterator[tuple[Section, str, pd.DataFrame]]:
    """The comparable sets of every section."""
    for section in sections_of(records):
        for caption, group in groups(records, section):
            yield section, caption, group


def presentable(group: pd.DataFrame, section: Section) -> pd.DataFrame:
    """The columns that people read, as text. The index is ``group``'s: a row's once for each of its settings."""
    what = pd.DataFrame(
        {
            "method": group["method"],
            "variant": group["variant"],
            "ratio": group["ratio"].map("{:g}".format),
            "counts": group["counted"],
            "reached": group["ratio_reached"].map("{:.4f}".format),
        }
    )
    if group["image_macs"].notna().any():
        what["MACs kept"] = [
            share(*macs) for macs in zip(group["image_macs"], group["image_macs_dense"], strict=True)
        ]
    same = [name for name, usual in (("variant", ""), ("counts", "weights")) if (what[name] == usual).all()]
    cells = group["measured"].map(section.cells).map(lambda found: found if isinstance(found, list) else [found])
    # The first setting of all rows, then the second: what is to be compared stands together.
    settings = [(number, index, row) for index, found in cells.items() for number, row in enumerate(found)]
    settings.sort(key=lambda setting: setting[0])
    measured = pd.DataFrame([row for _, _, row in settings]).fillna("—")
    place = [index for _, index, _ in settings]
    costs = pd.DataFrame(
        {
            "MACs an image (M)": group["image_macs"].map(
                lambda macs: "—" if pd.isna(macs) else f"{macs / 1e6:.4g}"
            ),
            "parameters (M)": (group["parameters"] / 1e6).map("{:.4g}".format),
            "bits a weight": group["bits"].map("{:.2f}".format),
            "size (MB)": (group["bytes"] / 1e6).map("{:.4g}".format),
            "compression (s)": group["compression_seconds"].map("{:.0f}".format),
            "evaluation (s)": group["evaluation_seconds"].map("{:.0f}".format),
        }
    )
    if (group["quantized"] == "none").all():
        costs = costs.drop(columns="bits a weight")
    if group["image_macs"].isna().all():
        costs = costs.drop(columns="MACs an image (M)")
    columns = (what.drop(columns=same).loc[place], measured, costs.loc[place])
    return pd.concat([part.reset_index(drop=True) for part in columns], axis=1).set_axis(place)


def share(part: float, whole: float) -> str:
    """``part`` of ``whole``; — where they are not known."""
    return "—" if pd.isna(part) else f"{part / whole:.4f}"


def markdown(records: list[dict[str, Any]], width: int | None = None) -> str:
    """Every comparable set as a Markdown table, and below them the cells that have no number.

    With a ``width`` in characters, tables that are wider lack some columns, and say which.
    """
    parts = []
    for section, caption, group in all_groups(records):
        shown = presentable(group, section)
        table = as_markdown(shown) if width is None else fitted(shown, width, section.file)
        parts.append(
            f"**{caption}**\n\n{table}" if width is None else f"{fill(f'**{caption}**', width)}\n\n{table}"
        )
    unfinished = [r for r in records if r["status"] != "done" or outdated(r)]
    if unfinished:
        old = "outdated (made by other component versions; run it again)"
        states = [old if outdated(r) else f"{r['status']} ({r['reason']})" for r in unfinished]
        lines = [f"- {r['label']}: {state}" for r, state in zip(unfinished, states, strict=True)]
        parts.append("**Cells without a number**\n\n" + _list(lines, width))
    left_out = [
        f"- {r['label']}: eval={name} ({why})"
        for r in records
        if r["status"] == "done"
        for name, why in r.get("left_out", {}).items()
    ]
    if left_out:
        parts.append("**Left out, since the model does not suit it**\n\n" + _list(left_out, width))
    if doubtful := [f"- {r['label']}: eval={name}: {why}" for r, name, why in in_doubt(records)]:
        parts.append("**Numbers in doubt**\n\n" + _list(doubtful, width))
    return "\n\n".join(parts) + "\n"


def in_doubt(records: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The numbers of records that came with a warning: the record, the evaluator, and the warning.

    Those of tiny models are left out: their weights are random and meant to be.
    """
    for record in records:
        tiny = str(record["config"]["model"]["path"]).startswith("tiny:")
        if record["status"] == "done" and not tiny:
            for name, measured in record["metrics"].items():
                if "warning" in measured:
                    yield record, name, measured["warning"]


def _list(lines: list[str], width: int | None) -> str:
    """The lines of a list, broken where they are wider than ``width``."""
    if width is None:
        return "\n".join(lines)
    lists = TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(lists.fill, lines))


def latex(records: list[dict[str, Any]]) -> str:
    """Every comparable set as a booktabs table (needs \\usepackage{booktabs})."""
    parts = []
    for section, caption, group in all_groups(records):
        table = presentable(group, section)
        escaped = re.sub(r"[_&%#$]", r"\\\g<0>", caption.replace("\\", "/"))
        alignment = "".join("l" if column in ("method", "variant", "counts") else "r" for column in table)
        parts.append(table.to_latex(index=False, caption=escaped, column_format=alignment, escape=True))
    return "\n".join(parts)


def csv(records: list[dict[str, Any]], section: Section) -> str:
    """All rows with full precision, a column for each part of the protocol; "" where there are none."""
    rows = comparison(records, section)
    return "" if rows.empty else csv_of(rows, section)


def csv_of(rows: pd.DataFrame, section: Section) -> str:
    """The CSV of some rows of ``comparison``, such as one comparable set."""
    protocol = pd.DataFrame(list(rows["protocol"]), index=rows.index).add_prefix("protocol_")
    details = pd.DataFrame([section.details(one) for one in rows["measured"]], index=rows.index)
    rows = rows.drop(columns=["protocol", "protocol_text", "identity", "reason", "measured", "whole", "told"])
    return pd.concat([rows, details, protocol], axis=1).to_csv(index=False)


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write table.md, table.tex and a CSV a section; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"table.md": markdown(records), "table.tex": latex(records)}
    texts |= {section.file: csv(records, section) for section in sections_of(records)}
    files = []
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text, encoding="utf-8")
            files.append(folder / name)
    return files


def variants(records: list[dict[str, Any]]) -> dict[str, str]:
    """What a table shows of each record (by key) besides its method and ratio; "" for most."""
    return {key: in_words(settings) for key, settings in told(records).items()}


def in_words(settings: dict[str, str]) -> str:
    """The settings of ``told`` as one text."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def present(settings: dict[str, str]) -> dict[str, str]:
    """Those of ``told`` but for the compressions that a cell does not have, which other cells of its table do."""
    return {name: value for name, value in settings.items() if value != "none"}


def told(records: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """By key, the settings by which a table tells a record from others of its method and ratio.

    That is every setting in which it differs from its method, and every one that the records of its method do not
    share.
    """
    found = {}
    for record in records:
        same_method = [other["settings"] for other in records if other["method"] == record["method"]]
        shown = {
            name: value
            for name, value in record["settings"].items()
            if name in record["variant"] or any(other.get(name, value) != value for other in same_method)
        }
        found[record["key"]] = {
            name: word(value) for name, value in shown.items() if not _is_implied(name, value, shown)
        }
    return found


def _is_implied(name: str, value: Any, shown: dict[str, Any]) -> bool:
    """Whether the name of an option, which is shown too, already says this setting."""
    axis, _, entry = name.partition(".")
    return bool(entry) and axis in shown and default(axis, shown[axis], entry) == value
