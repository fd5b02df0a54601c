"""Whether everything below a results folder still is as it was written: all of it is read again."""

from __future__ import annotations

import re
from pathlib import Path

from lowrank_lab.artifacts import store
from lowrank_lab.records import seal
from lowrank_lab.records.results import CHECKPOINTS, GRID_ENTRIES, RECORD_ENTRIES, Results


def check(results: Results) -> tuple[str, bool]:
    """A line for each record, artifact and checkpoint that is damaged, with what to do; and whether none is."""
    lines, roots = [], {results.root / "artifacts"}
    files = dict.fromkeys(results.root.glob("records/*.json"), RECORD_ENTRIES)
    files |= dict.fromkeys(results.root.glob("grids/*.json"), GRID_ENTRIES)
    for file, entries in sorted(files.items()):
        value, wrong = seal.examine(file, entries)
        if value is None:
            lines.append(f"{file} {wrong}: run its cell again, or delete it")
        elif entries is RECORD_ENTRIES:
            roots.add(Path(value["config"].get("artifacts", results.root / "artifacts")))
    folders = sorted(folder for root in {root.resolve() for root in roots} for folder in _artifacts(root))
    folders += sorted(folder for folder in results.root.glob(f"{CHECKPOINTS}/[!.]*") if folder.is_dir())
    for folder in folders:
        manifest, wrong = store.examine(folder, thorough=True)
        if manifest is None:
            lines.append(f"{folder} is damaged ({wrong}): delete it, the command that made it makes it again")
    read = f"{len(files)} records and grids, {len(folders)} artifacts and checkpoints read: {len(lines)} damaged"
    return "\n".join([*lines, read]), not lines


def _artifacts(root: Path) -> list[Path]:
    """Folders named by a key; others that somebody may have below ``root`` are none of ours."""
    return [folder for folder in root.glob("*/*") if re.fullmatch("[0-9a-f]{20}", folder.name)]
