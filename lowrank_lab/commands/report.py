"""Tables and figures of all records.

python report.py                      all of it: tables, figures, the papers' tables and figures, the page
python report.py status               which cells are done, failed, skipped and missing
python report.py table=dobi/table2    a published table with our numbers (Markdown, CSV, LaTeX)
python report.py figure=dobi/figure8  a figure of a paper from our records (PNG, PDF, and the CSV that it shows)
python report.py page                 all of it as one HTML file: <results>/index.html
python report.py check                read all records, artifacts and checkpoints again: is any of them damaged?
python report.py count                which tables and figures have published numbers, recipes and results; status 1
                                      where a recipe's cells cannot meet a number and the catalogue gives no reason
python report.py keep                 copy the records of experiments at scale=small to results/small (--out), which
                                      is in git: without artifacts and without names of folders
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.basics.paths import REPORT, RUN
from lowrank_lab.process import stopping
from lowrank_lab.process.garbage import collect_rarely

if TYPE_CHECKING:
    from lowrank_lab.records.results import Results

CHOICES = "all, status, check, count, keep, table=NAME, figure=NAME, page"
KEPT = Path("results/small")  # what ``keep`` writes is in git there
WIDTH = 120  # of tables that are printed where there is no terminal and no COLUMNS


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    stopping.end_with_reader()  # python report.py | head
    collect_rarely()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("python report.py", REPORT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", default="all", help=CHOICES)
    parser.add_argument(
        "--results", type=_folder, default=Path("results"), help="folder given to run.py as results="
    )
    parser.add_argument(
        "--out",
        type=_folder,
        help=f"where to write (default: <results>/report; page: <results>; keep: {KEPT})",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log what is written to this W&B project as well")
    arguments = parser.parse_args()
    setting, equals, value = arguments.what.partition("=")
    if equals and setting in ("results", "out", "wandb"):
        sys.exit(f"error: {arguments.what}: write --{setting} {value}")

    from lowrank_lab.basics import redaction
    from lowrank_lab.basics.errors import UserError
    from lowrank_lab.records import tracking
    from lowrank_lab.records.results import Results

    redaction.guard_streams()
    results = Results(arguments.results)
    if not arguments.results.is_dir():
        sys.exit(f"error: --results={arguments.results}: no such folder; run something first: {RUN}")
    try:
        files = report(arguments.what, results, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a folder of another user, a file where a folder is wanted, a full disk
        sys.exit(f"error: {error.filename}: {error.strerror}; choose where to write with --out")
    if arguments.wandb and files:
        tracking.log_report(arguments.what, arguments.results, files, arguments.wandb)


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def report(what: str, results: Results, folder: Path | None) -> list[Path]:
    """Print and write a report, into ``folder`` if it is given; returns the files.

    Raises UserError for an unknown name or no records.
    """
    from lowrank_lab.basics.errors import UserError
    from lowrank_lab.reporting import check, coverage, keep, page, paper_figures, paper_tables, published, reach
    from lowrank_lab.reporting.status import status

    out, index = folder or results.root / "report", (folder or results.root) / "index.html"

    kind, _, name = what.partition("=")
    if kind in ("table", "figure") and not name:
        known = published.tables() if kind == "table" else published.figures()
        raise UserError(f"{what}: which one? write {kind}=NAME; names are {', '.join(known)}")
    if what == "status":
        print(status(results))
        return []
    if what == "check":
        found, good = check.check(results)
        print(found)
        if not good:
            sys.exit(1)
        return []
    if what == "count":
        reached = reach.counts()
        print(coverage.markdown(results, reached))
        if any(reached["faults"]):
            sys.exit(1)
        return []
    if what == "keep":
        kept = folder or KEPT
        files = keep.keep(results, kept)
        print((kept / "README.md").read_text(encoding="utf-8"))
        return files
    if kind == "table":
        files = paper_tables.write(name, results, out / "papers")
        print(files[0].read_text(encoding="utf-8"))  # the Markdown
        return _wrote(files)
    if kind == "figure":
        if not (files := paper_figures.write(name, results, out / "papers")):
            recipes = " or ".join(f"{RUN} -m experiment={recipe}" for recipe in published.recipes(name))
            raise UserError(f"{name}: no record has what it shows; run {recipes}")
        return _wrote(files)
    if what == "page":
        return _wrote([page.write(results, index)])
    if what == "all":
        return [*everything(results, out), *_wrote([page.write(results, index)])]
    raise UserError(f"{what}: no such report; choose {CHOICES}")


def everything(results: Results, out: Path) -> list[Path]:
    """All tables and figures, and those of the papers whose recipes have run or failed; returns the files."""
    from lowrank_lab.basics.errors import UserError
    from lowrank_lab.reporting import coverage, figures, generation, paper_figures, paper_tables, published, tables

    records = results.records()
    if not records:
        raise UserError(f"no records in {results.root}; run something first: {RUN}")
    print(tables.markdown(records, shutil.get_terminal_size(fallback=(WIDTH, 24)).columns))
    files = _wrote([*tables.write(records, out), *figures.write(records, out), *generation.write(records, out)])
    for name in (name for name, cells in coverage.ran(results).items() if cells):
        write = paper_tables.write if name in published.tables() else paper_figures.write
        files += _wrote(write(name, results, out / "papers"))
    return files


def _wrote(files: list[Path]) -> list[Path]:
    for file in files:
        print(f"wrote {file}")
    return files


if __name__ == "__main__":
    main()
