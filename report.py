"""Tables and figures of all records.

python report.py                      all of it: tables, figures, the papers' tables and figures, the page
python report.py status               which cells are done, failed, skipped and missing
python report.py table=dobi/table2    a published table beside our numbers (Markdown, CSV, LaTeX)
python report.py figure=dobi/figure8  a figure of a paper from our records (PNG, PDF, and the CSV that it shows)
python report.py page                 all of it as one HTML file: <results>/index.html
python report.py count                which tables and figures have published numbers, recipes and results
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank_lab.results import Results


def main() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python report.py | head
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", help="all, status, count, table=NAME, figure=NAME, page")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder given to run.py as results=")
    parser.add_argument("--out", type=Path, help="where to write (default: <results>/report; the page: <results>)")
    arguments = parser.parse_args()

    from lowrank_lab.errors import UserError
    from lowrank_lab.results import Results

    results = Results(arguments.results)
    out = arguments.out or arguments.results / "report"
    index = (arguments.out or arguments.results) / "index.html"
    try:
        report(arguments.what, results, out, index)
    except UserError as error:
        sys.exit(f"error: {error}")


def report(what: str, results: Results, out: Path, index: Path) -> None:
    """Print and write what is asked for. Raises UserError for what is not known or has no records."""
    from lowrank_lab.errors import UserError
    from lowrank_lab.reporting import coverage, page, paper_tables, published
    from lowrank_lab.reporting.status import status

    kind, _, name = what.partition("=")
    if what == "status":
        print(status(results))
    elif what == "count":
        print(coverage.markdown(results))
    elif kind == "table":
        source = published.load(name)
        print(paper_tables.markdown(source, paper_tables.join(source, results), results))
        _wrote(paper_tables.write(name, results, out / "papers"))
    elif what == "page":
        _wrote([page.write(results, index)])
    elif what == "all":
        everything(results, out)
        _wrote([page.write(results, index)])
    else:
        raise UserError(f"{what}: no such report; choose all, status, count, table=NAME, figure=NAME, page")


def everything(results: Results, out: Path) -> None:
    """All tables and figures, and those of the papers whose recipes have results."""
    from lowrank_lab.errors import UserError
    from lowrank_lab.reporting import coverage, figures, generation, paper_tables, tables

    records = results.records()
    if not records:
        raise UserError(f"no records in {results.root}; run something first: python run.py")
    print(tables.markdown(records))
    _wrote([*tables.write(records, out), *figures.write(records, out), *generation.write(records, out)])
    found = coverage.coverage(results)
    for name in found["name"][(found["kind"] == "table") & (found["done"] > 0)]:
        _wrote(paper_tables.write(name, results, out / "papers"))


def _wrote(files: list[Path]) -> None:
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    main()
