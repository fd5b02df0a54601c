"""What the models of a grid wrote, side by side: a page from records alone, with a table for each question."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab.reporting import tables
from lowrank_lab.reporting.section import fraction
from lowrank_lab.reporting.sections import REPETITION

ANSWER = ("greedy", "repetition", "sampled", "repetition")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # for what cannot be printed
HEAD = """# Generated text

Repetition is the fraction of an answer's 4-grams of tokens that occurred in it before (— where it has fewer than 4
tokens). […] marks an answer that was cut at the limit of tokens. An instruct model may have nothing to say to a
question outside of its chat template: ask it with eval.generation.chat=true."""


def page(records: list[dict[str, Any]]) -> str:
    """Markdown: a part for each model and protocol, in it a table for each question; "" where no model answered.

    The rows are in the order of ``tables.comparison``: the dense model first, then by falling ratio.
    """
    parts = []
    for caption, group in tables.groups(records, REPETITION):
        if questions := list(_questions(group)):
            parts += [f"## {caption}", *questions]
    return "\n\n".join([HEAD, *parts]) + "\n" if parts else ""


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write generation.md; returns the files written."""
    text = page(records)
    if not text:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "generation.md"
    file.write_text(text, encoding="utf-8")
    return [file]


def _questions(group: pd.DataFrame) -> Iterator[str]:
    """Heading and table of each question that the cells of ``group`` were asked."""
    shown = tables.presentable(group, REPETITION)
    shown = shown[[name for name in ("method", "variant", "ratio", "counts") if name in shown]]
    for question, how, answers in answered(group, _escaped):
        rows = [[*shown, *ANSWER]]
        rows += [[*names, *texts] for names, texts in zip(shown.itertuples(index=False), answers, strict=True)]
        lines = [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        yield f"### {_escaped(question)}\n\n({how})\n\n" + "\n".join(lines)


def answered(group: pd.DataFrame, show: Callable[[str], str]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Each question that the cells of ``group`` were asked, how, and of each row the texts of ANSWER.

    ``show`` makes of a model's text what can be shown.
    """
    known = [measured["answers"] for measured in group["measured"] if "answers" in measured]
    for number, asked in enumerate(known[0] if known else []):
        how = f"after {asked['shots']} examples" if asked["shots"] else "alone"
        yield asked["question"], how, [_answers(measured, number, show) for measured in group["measured"]]


def _answers(measured: dict[str, Any], number: int, show: Callable[[str], str]) -> list[str]:
    """One model's answers to a question: text and repetition of the greedy and the sampled one."""
    if "answers" not in measured:
        return [f"({measured['not_finite']} is not finite)", "—", "", "—"]
    cells = []
    for kind in ("greedy", "sampled"):
        answer = measured["answers"][number][kind]
        text = show(answer["text"]) or "(nothing)"
        cells += [f"{text} […]" if answer["cut"] else text, fraction(answer["repetition"])]
    return cells


def _escaped(text: str) -> str:
    """Any text as one cell of a Markdown table that shows it as it is."""

    def escape(line: str) -> str:
        return re.sub(r"([\\`*_~|\[\]$])", r"\\\1", html.escape(line, quote=False))

    return "<br>".join(map(escape, printable(text).splitlines()))


def printable(text: str) -> str:
    """Any text in characters that can be printed, line by line."""

    def shown(line: str) -> str:
        return "".join(c if c.isprintable() else " " if c.isspace() else UNKNOWN for c in line)

    return "\n".join(map(shown, text.strip().splitlines()))
