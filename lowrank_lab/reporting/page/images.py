"""The figures of the page, as PNG to look at, and as PNG, PDF and CSV to take away."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import figures, paper_figures
from lowrank_lab.reporting.drawing import content
from lowrank_lab.reporting.figures import Drawn
from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.tags import Tags


@dataclass(frozen=True)
class Image:
    """A figure: an id for links to it, the name of its files, its caption, what it shows in words, its width and
    height in pixels, the files as data URIs, and the values of filters under which it is shown."""

    id: str
    name: str
    caption: str
    alt: str
    size: tuple[int, int]
    png: str
    pdf: str
    csv: str
    tags: Tags


def images(results: Results, records: dict[str, dict[str, Any]]) -> Iterator[Image]:
    """The papers' figures, then ours; ``records`` are those of ``results`` by key."""
    for drawn in paper_figures.drawn(results):
        yield _image(drawn, tags.of_columns(drawn.rows))
    for drawn in figures.drawn(list(records.values())):
        of_rows = (tags.of_measurement(records[row["key"]], row) for _, row in drawn.rows.iterrows())
        yield _image(drawn, tags.union(of_rows))


def _image(drawn: Drawn, tags: Tags) -> Image:
    png, pdf = (content(drawn.figure, kind) for kind in ("png", "pdf"))
    sources = _data("image/png", png), _data("application/pdf", pdf), _data("text/csv", drawn.csv.encode())
    return Image(f"figure-{drawn.name}", drawn.name, drawn.caption, _alt(drawn.figure), _size(png), *sources, tags)


def _size(png: bytes) -> tuple[int, int]:
    """Width and height, which stand at the head of every PNG: with them, nothing moves while a page is read."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _alt(figure: plt.Figure) -> str:
    """What is drawn against what, and the names of the lines."""
    axes = [one for one in figure.axes if one.get_visible()]
    labels = (label for one in axes for label in one.get_legend_handles_labels()[1])
    y = next(filter(None, (one.get_ylabel() for one in axes)), "")
    x = next(filter(None, (one.get_xlabel() for one in axes)), "")
    text = f"{y} against {x}: {', '.join(dict.fromkeys(labels))}"
    return " ".join(text.split())
