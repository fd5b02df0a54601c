"""Whether the models of a grid can be loaded, before its first cell runs."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_lab.cells.cell import Cell
from lowrank_lab.models.tasks.named import TASKS


def check_folders(cells: Iterable[Cell]) -> None:
    """Raises UserError for a model folder whose weights or tokenizer are not those of its config.json.

    Models of the hub, which may have to be downloaded, and those that are converted are looked at when loaded.
    """
    folders = {
        (cell.source.location, bool(cell.cfg.model.trust_remote_code)): TASKS[cell.task]
        for cell in cells
        if cell.source.kind == "folder"
    }
    for (location, trust_remote_code), task in folders.items():
        task.check(location, None, trust_remote_code)
