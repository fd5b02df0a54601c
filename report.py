"""Tables and figures of all records.

python report.py            tables (Markdown, CSV, LaTeX), perplexity against ratio (PNG, PDF), generated text
python report.py status     which cells are done, failed, skipped and missing
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path


def main() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python report.py | head
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "status"), default="all")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder given to run.py as results=")
    parser.add_argument("--out", type=Path, default=None, help="where to write (default: <results>/report)")
    arguments = parser.parse_args()

    from lowrank_lab.results import Results

    results = Results(arguments.results)
    if arguments.what == "status":
        from lowrank_lab.reporting.status import status

        print(status(results))
        return

    records = results.records()
    if not records:
        sys.exit(f"error: no records in {arguments.results}; run something first: python run.py")
    from lowrank_lab.reporting import figures, generation, tables

    out = arguments.out or arguments.results / "report"
    print(tables.markdown(records))
    files = [*tables.write(records, out), *figures.write(records, out), *generation.write(records, out)]
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    main()
