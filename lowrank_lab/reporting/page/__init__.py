"""All results as one HTML file: no server, no network, no other file. The same records give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import published
from lowrank_lab.reporting.page import ours, papers, ranking, states, tags
from lowrank_lab.reporting.page.answers import answers
from lowrank_lab.reporting.page.facts import facts
from lowrank_lab.reporting.page.images import Image, images
from lowrank_lab.reporting.status import STATES, asked, count

FOLDER = Path(__file__).parent
MOST_HEADLINES = 4


def write(results: Results, file: Path) -> Path:
    """Write the page into ``file``; returns it. Raises UserError where there are no records."""
    text = html(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def html(results: Results) -> str:
    """The page: what came out, published tables with our numbers, our tables, answers, figures, states of cells.

    Raises UserError where there are no records.
    """
    records = {record["key"]: record for record in results.records()}
    if not records:
        raise UserError(f"no records in {results.root}; run something first: {RUN}")
    sources = [paper for name in published.tables() if (paper := papers.paper(name, results))]
    measured, answered, grids = ours.measured(records), answers(records), states.grids(results, records)
    others = [*states.without_number(records), *states.left_out(records), *states.in_doubt(records)]
    rows = [
        row for table in (*(p.table for p in sources), *measured, *answered, *grids, *others) for row in table.rows
    ]
    headlines = list(ranking.headlines(list(records.values())))
    best, rest = _best_first(list(images(results, records)), [caption for caption, _ in headlines])
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
        headlines=headlines[:MOST_HEADLINES],
        best=best,
        papers=sources,
        measured=measured,
        answers=answered,
        images=rest,
        states={state: number for state, number in count(asked(results)).items() if number},
        grids=grids,
        others=others,
        filters=tags.filters(rows),
        named=tags.FILTERS,
        rows=len(rows),
        records=_json({key: facts(record) for key, record in records.items()}),
        explained=EXPLAINED,
        json=json.dumps,
    )


def _best_first(found: list[Image], captions: list[str]) -> tuple[Image | None, list[Image]]:
    """The figure of the first headline, or else the first there is; and the rest."""
    best = next((image for caption in captions for image in found if image.caption == caption), None)
    best = best or next(iter(found), None)
    return best, [image for image in found if image is not best]


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


def _json(value: object) -> str:
    """JSON that may stand within <script>: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
