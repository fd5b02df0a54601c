"""README and docs/: short enough to be read, every link leads somewhere, every method names its paper."""

from __future__ import annotations

import re
import sys

import pytest

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.recipe_cells import recipe_cells

from .forked import REPOSITORY

PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_within_the_repository_lead_to_files(page):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith(("http:", "https:"))]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_method_names_its_paper(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "docs"), *sys.path])
    from options_page import page, paper

    methods = {file.stem for file in (REPOSITORY / "conf" / "method").glob("*.yaml")}
    assert {method for method in methods if paper(method) is None} == {"dense"}
    text = page("method", "Methods")
    assert text.count("Paper: [") == len(methods) - 1
    assert all(f"## `{method}`" in text for method in methods)


def test_the_table_of_the_readme_is_that_of_the_committed_records():
    """Perplexities alone: the seconds are of one run."""
    demo = [cell.record for cell in recipe_cells(("demo",), Results(REPOSITORY / "results" / "small"))]
    shown = [
        line for line in tables.markdown([record for record in demo if record]).splitlines() if line[:1] == "|"
    ]
    columns = lambda lines: [[word.strip() for word in line.split("|")][1:5] for line in lines]
    for page in ("README.md", "docs/quickstart.md"):
        lines = (REPOSITORY / page).read_text(encoding="utf-8").split("| method       | ratio")[1].splitlines()
        written = lines[1 : lines.index("")]
        assert columns(written) == columns(shown[1:]), page
