"""Records to commit: those of experiments, without artifacts and without the folders of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lowrank_lab.artifacts.store import write_json, write_text
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.records.results import FOLDER_SETTINGS, GRID_ENTRIES, Results
from lowrank_lab.records.seal import read
from lowrank_lab.reporting.recipe_cells import experiment_of
from lowrank_lab.reporting.status import state_of

README = """# Our numbers at scale={scale}

The records of experiments that have run. `python report.py --results {folder}` makes tables, figures and the
page from them. After an experiment has run, `python report.py --results RESULTS keep --out {folder}` adds or
refreshes it; the same command writes this page. Artifacts are not kept: a figure that needs them says which
command computes them.

{table}
"""


def keep(results: Results, out: Path, scale: str = "small") -> list[Path]:
    """Copy the grids of experiments at ``scale``, with their finished records, into the results folder ``out``.

    A grid replaces the one that the same command has in ``out``; records that no grid lists any more are deleted. A
    failed cell is not copied, as its traceback is of one machine. Returns the files in ``out``. Raises UserError
    where ``out`` is the folder of ``results``, or where no such experiment has run.
    """
    if out.resolve() == results.root.resolve():
        raise UserError(f"keep: --out is the folder of --results, {out}; choose another, such as results/{scale}")
    found = {name: file for name, file in _grids(results.root).items() if _finished(file, results, scale)}
    if not found:
        run = f"{RUN} -m experiment=demo scale={scale}"
        raise UserError(f"keep: no experiment at scale={scale} has run in {results.root}; start with: {run}")
    for name, file in _grids(out).items():
        if name in found:
            file.unlink()
    kept = Results(out)
    for file in found.values():
        write_json(out / "grids" / file.name, read(file, GRID_ENTRIES))
        for record in _finished(file, results, scale):
            kept.write(_without_folders(record), indent=None)
    listed = {key for grid in kept.grids() for key in grid["cells"]}
    for file in out.glob("records/*.json"):
        if file.stem not in listed:
            file.unlink()
    table = summary(kept).to_markdown(index=False, disable_numparse=True)
    write_text(out / "README.md", README.format(scale=scale, folder=out.as_posix(), table=table))
    return [out / "README.md", *sorted(out.glob("grids/*.json")), *sorted(out.glob("records/*.json"))]


def summary(kept: Results) -> pd.DataFrame:
    """One row a grid: its command, how many cells are current, outdated or not there, minutes, commits."""
    rows = []
    for grid in sorted(kept.grids(), key=lambda grid: grid["name"]):
        records = [record for key in grid["cells"] if (record := kept.find(key)) is not None]
        outdated = sum(state_of(record)[0] == "outdated" for record in records)
        rows.append(
            {
                "experiment": grid["name"],
                "current": len(records) - outdated,
                "outdated": outdated,
                "not there": len(grid["cells"]) - len(records),
                "minutes": f"{sum(record['seconds'] for record in records) / 60:.0f}",
                "from": min((record["started"][:10] for record in records), default=""),
                "commits": ", ".join(sorted({_commit(record) for record in records})),
            }
        )
    return pd.DataFrame(rows)


def _commit(record: dict[str, Any]) -> str:
    commit = (record["git"]["commit"] or "unknown")[:7]
    return f"{commit} with changes" if record["git"]["dirty"] else commit


def _grids(root: Path) -> dict[str, Path]:
    """The newest grid of every command by its name."""
    files = sorted(root.glob("grids/*.json"), key=lambda file: file.stat().st_mtime)
    return {grid["name"]: file for file in files if (grid := read(file, GRID_ENTRIES)) is not None}


def _finished(grid: Path, results: Results, scale: str) -> list[dict[str, Any]]:
    """The finished records of a grid, where it is of an experiment and of ``scale``."""
    of_grid = read(grid, GRID_ENTRIES)
    if of_grid is None or experiment_of(of_grid["name"]) is None:
        return []
    records = [record for key in of_grid["cells"] if (record := results.finished(key)) is not None]
    return [record for record in records if record["config"].get("scale", {}).get("name") == scale]


def _without_folders(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` without the settings that name folders of one machine."""
    words = [word for word in record["command"][1:] if word.partition("=")[0] not in FOLDER_SETTINGS]
    config = {name: value for name, value in record["config"].items() if name not in FOLDER_SETTINGS}
    return {**record, "command": [Path(record["command"][0]).name, *words], "config": config}
