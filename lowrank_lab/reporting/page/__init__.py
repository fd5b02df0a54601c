"""All results as one HTML file: no server, no network, no other file. The same records give the same bytes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import pyplot as plt

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import figures, paper_figures, published
from lowrank_lab.reporting.page import ours, papers
from lowrank_lab.reporting.page.facts import facts
from lowrank_lab.reporting.page.table import Table
from lowrank_lab.reporting.status import STATES, asked, count

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Image:
    """A figure: an id for links to it, its caption, what it shows in words, and a PNG as a data URI."""

    id: str
    caption: str
    alt: str
    source: str


def write(results: Results, file: Path) -> Path:
    """Write the page into ``file``; returns it. Raises UserError where there are no records."""
    text = html(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def html(results: Results) -> str:
    """The page: state of the grids, published tables with our numbers, our tables, figures, and facts of records.

    Raises UserError where there are no records.
    """
    records = results.records()
    if not records:
        raise UserError(f"no records in {results.root}; run something first: {RUN}")
    grids = ours.grids(results)
    sources = [paper for name in published.tables() if (paper := papers.paper(name, results))]
    measured = ours.measured(records)
    others = [table for table in (ours.without_number(records), ours.left_out(records)) if table]
    tables = [*grids, *(paper.table for paper in sources), *measured, *others]
    template = Environment(
        loader=PackageLoader("lowrank_lab.reporting.page", "."),
        autoescape=True,  # labels, reasons and commands may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("template.html")
    return template.render(
        style=(FOLDER / "style.css").read_text(encoding="utf-8"),
        script=(FOLDER / "script.js").read_text(encoding="utf-8"),
        states=count(asked(results)),
        grids=grids,
        papers=sources,
        own=[*measured, *others],
        images=list(_images(results)),
        filters=_filters(tables),
        rows=sum(len(table.rows) for table in tables),
        records=_json({record["key"]: facts(record) for record in records}),
        explained=EXPLAINED,
        json=json.dumps,
    )


EXPLAINED = dict(
    zip(
        STATES,
        (
            "has its numbers",
            "stopped with an error; a run of the same command tries it again",
            "cannot be done, for the reason given",
            "is being computed",
            "waits for its turn on a cluster",
            "was not finished when its job on a cluster ended; the same command submits it again",
            "was asked for and has not run yet",
            "was made by other versions of its components; its numbers are not shown",
        ),
        strict=True,
    )
)


def _filters(tables: list[Table]) -> dict[str, list[tuple[str, str]]]:
    """By what can be filtered, the values that some row has, each with what people read."""
    rows = [row for table in tables for row in table.rows]
    names = published.method_names()

    def values(what: str) -> set[str]:
        return {value for row in rows for value in row.tags[what]}

    methods = sorted(values("method"), key=lambda method: (method != "dense", method))
    ratios = sorted(values("ratio") - {"none"}, key=float, reverse=True)
    return {
        "model": [(model, model) for model in sorted(values("model"), key=str.lower)],
        "method": [(method, f"{names[method]} ({method})" if method in names else method) for method in methods],
        "ratio": [(ratio, ratio) for ratio in [*ratios, *(values("ratio") & {"none"})]],
    }


def _images(results: Results) -> Iterator[Image]:
    for name, title, figure in paper_figures.drawn(results):
        yield _image(name.replace("/", "-"), title, figure)
    for name, caption, figure in figures.drawn(results.records()):
        yield _image(name, caption, figure)


def _image(name: str, caption: str, figure: plt.Figure) -> Image:
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return Image(f"figure-{name}", caption, _alt(figure), source)


def _alt(figure: plt.Figure) -> str:
    """What is drawn against what, and the names of the lines."""
    axes = [one for one in figure.axes if one.get_visible()]
    labels = (label for one in axes for label in one.get_legend_handles_labels()[1])
    y = next(filter(None, (one.get_ylabel() for one in axes)), "")
    x = next(filter(None, (one.get_xlabel() for one in axes)), "")
    text = f"{y} against {x}: {', '.join(dict.fromkeys(labels))}"
    return " ".join(text.split())


def _json(value: object) -> str:
    """JSON that may stand within <script>: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
