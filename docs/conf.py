"""Sphinx builds these pages: make docs."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from options_page import write_pages  # noqa: E402
from records_tables import write_tables  # noqa: E402

from lowrank_lab import __version__  # noqa: E402

project = "lowrank_lab"
author = "the authors of lowrank_lab"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generated/tables"]  # pages include these
html_theme = "furo"
html_title = "lowrank_lab"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"

write_pages(HERE / "generated")
write_tables(HERE / "generated" / "tables")
