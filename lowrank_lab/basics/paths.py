"""Where the files of the package itself are, and what its commands are called there. No torch."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has the options within the package, a checkout beside it.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
# What a user types: a checkout has the commands as files.
RUN, REPORT = (
    ("lowrank-lab run", "lowrank-lab report") if CONF.parent == PACKAGE else ("python run.py", "python report.py")
)
