"""Records to commit, and the committed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowrank_lab.basics.errors import UserError
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import keep, status

from .conftest import REPOSITORY, Lab

COMMITTED = REPOSITORY / "results" / "small"


def of_an_experiment(lab: Lab, folder: Path) -> Results:
    """The results of ``lab``, as an experiment would have made them."""
    results = Results(folder)
    cells = {record["key"]: record["label"] for record in lab.results.records()}
    for record in lab.results.records():
        results.write(record | {"command": ["/home/somebody/run.py", "method=svd", "results=/home/somebody/out"]})
    (folder / "grids").mkdir()
    (folder / "grids" / "a.json").write_text(json.dumps({"name": "experiment=demo", "cells": cells}))
    return results


def test_kept_records_have_no_folder_and_an_unfinished_cell_is_not_there(grid_lab, tmp_path):
    results = of_an_experiment(grid_lab, tmp_path / "all")
    failed, *others = results.records()
    results.write(failed | {"status": "failed", "reason": "no memory", "traceback": "File /home/somebody"})
    keep.keep(results, tmp_path / "small")
    kept = Results(tmp_path / "small")
    assert {record["key"] for record in kept.records()} == {record["key"] for record in others}
    text = "".join(file.read_text() for file in kept.root.rglob("*.*"))
    assert "/home/" not in text
    assert str(grid_lab.root) not in text
    assert kept.records()[0]["metrics"] == results.find(kept.records()[0]["key"])["metrics"]
    row = keep.summary(kept).iloc[0]
    assert (row["current"], row["outdated"], row["not there"]) == (len(others), 0, 1)


def test_a_grid_replaces_that_of_the_same_command(grid_lab, tmp_path):
    results = of_an_experiment(grid_lab, tmp_path / "all")
    keep.keep(results, tmp_path / "small")
    grid = json.loads((results.root / "grids" / "a.json").read_text())
    gone, *_ = grid["cells"]
    del grid["cells"][gone]
    (results.root / "grids" / "a.json").unlink()
    (results.root / "grids" / "b.json").write_text(json.dumps(grid))
    keep.keep(results, tmp_path / "small")
    kept = Results(tmp_path / "small")
    assert [grid["cells"] for grid in kept.grids()] == [grid["cells"]]
    assert kept.find(gone) is None


@pytest.mark.parametrize("name", ["method=svd", "experiment=demo scale=paper"])
def test_nothing_to_keep_is_an_error(grid_lab, tmp_path, name):
    results = of_an_experiment(grid_lab, tmp_path / "all")
    grid = json.loads((results.root / "grids" / "a.json").read_text())
    (results.root / "grids" / "a.json").write_text(json.dumps(grid | {"name": name}))
    scale = "paper" if "paper" in name else "small"
    with pytest.raises(UserError, match="no experiment at scale"):
        keep.keep(results, tmp_path / "small", scale)
    with pytest.raises(UserError, match="choose another"):
        keep.keep(results, results.root)


def test_the_committed_records_are_whole_and_their_page_names_the_outdated_ones():
    committed = Results(COMMITTED)
    records = committed.records()
    assert len(records) == len(list(COMMITTED.glob("records/*.json"))) > 0  # none is damaged
    for record in records:
        assert not re.search(r'"/(?!/)[\w.-]+/', json.dumps(record)), f"{record['key']} names a folder of a machine"
    listed = {key for grid in committed.grids() for key in grid["cells"]}
    assert {record["key"] for record in records} <= listed
    outdated = [record for record in records if status.state_of(record)[0] == "outdated"]
    page = (COMMITTED / "README.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    column = [cell.strip() for cell in rows[0]].index("outdated")
    assert sum(int(row[column]) for row in rows[1:]) >= len(outdated), (
        "records are outdated: run their experiments again, or python report.py keep, whose page names them"
    )
