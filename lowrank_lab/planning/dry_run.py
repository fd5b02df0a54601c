"""``dry_run=true``: the memory, disk space and FLOPs that every cell of a grid needs, and whether they fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.cells.cell import Cell
from lowrank_lab.planning.shapes import Shapes, shapes_of, with_sites
from lowrank_lab.planning.steps import Planner, Step
from lowrank_lab.process import environment
from lowrank_lab.running import runner
from lowrank_lab.running.context import pick_device

NOTE = (
    "Memory is the peak of the process, with weights that are mapped from their checkpoint; what cells share is "
    "counted for the first of them.\n≥: not estimated are refinements, allocations that search or train, pruning, "
    "quantization and your own compressions, perplexities of texts of unknown length, and other evaluations."
)


@dataclass
class Machine:
    """Bytes of memory and of GPU memory (0: no GPU), and the bytes free on each disk after the planned writes."""

    memory: int
    gpu: int
    free: dict[int, int] = field(default_factory=dict)

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        return cls(environment.memory_limit(), gpu)

    def free_after(self, count: int, folder: Path) -> int:
        """Subtract ``count`` bytes for ``folder``; returns the free bytes after that, negative where too few."""
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        disk = os.stat(folder).st_dev
        self.free.setdefault(disk, shutil.disk_usage(folder).free)
        self.free[disk] -= count
        return self.free[disk]


def print_needs(cells: Sequence[Cell]) -> bool:
    """Print what each cell needs and what the machine lacks; returns whether all fits. Nothing is computed."""
    device = pick_device(cells[0].cfg.device)
    machine = Machine.here(device)
    models: dict[tuple[str, str | None], Shapes] = {}
    planned: set[tuple[str, str, str]] = set()
    seen: set[str] = set()
    rows, everything, shortage_lines = [], [], []
    for cell in cells:
        state, steps = "finished", []
        if cell.key in seen:
            state = "as above"
        elif runner.finished(cell) is None:
            state = "to be computed"
            try:
                model = cell.keys.model, cell.tower
                if model not in models:
                    models[model] = shapes_of(cell)
                planner = Planner(cell, with_sites(models[model], cell), machine.gpu > 0)
                steps = [step for step in planner.steps() if _is_missing(step, planned)]
            except SkippedCell as why:
                state = f"to be skipped: {why}"
        seen.add(cell.key)
        shortages = list(_shortages(cell, steps, machine))
        rows.append({"cell": cell.label, "state": "does not fit" if shortages else state, **_needs(steps)})
        shortage_lines += [f"{cell.label}: {line}" for line in shortages]
        everything += steps
    count = f"{sum(row['state'] == 'finished' for row in rows)} of {len(seen)} finished"
    rows.append({"cell": "all", "state": count, **_needs(everything)})
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    print(f"\n{NOTE}")
    for line in shortage_lines:
        print(f"does not fit: {line}")
    return not shortage_lines


def _is_missing(step: Step, planned: set[tuple[str, str, str]]) -> bool:
    """Whether neither the store has the step nor an earlier cell computes it; adds its artifact to ``planned``."""
    if step.artifact is None:
        return True
    store, kind, key = step.artifact
    place = (str(store.root), kind, key)
    if place in planned or store.get(kind, key) is not None:
        return False
    planned.add(place)
    return True


def _needs(steps: Sequence[Step]) -> dict[str, str]:
    """The entries of a row: the highest memory, the sums of the rest; a ≥ where a step is not estimated."""
    if not steps:
        return dict.fromkeys(("memory", "GPU memory", "disk", "FLOPs"), "0")
    least = "" if all(step.known for step in steps) else "≥ "
    device = max(step.device for step in steps)
    return {
        "memory": least + size(max(step.host for step in steps)),
        "GPU memory": least + size(device) if device else "0",
        "disk": size(sum(step.disk for step in steps)),
        "FLOPs": f"{least}{sum(step.flops for step in steps):.3g}",
    }


def _shortages(cell: Cell, steps: Sequence[Step], machine: Machine) -> Iterator[str]:
    """For each resource that is too small: how much is missing, and what to change. ``steps`` are not done yet."""
    if not steps:
        return
    largest = max(steps, key=lambda step: step.host - step.mapped)
    if (needed := largest.host - largest.mapped) > machine.memory:
        remedies = [] if cell.cfg.calibration.offload else ["calibration.offload=true"]
        remedies += ["the dtype of the checkpoint, whose weights stay on the disk"] if not largest.mapped else []
        yield _short("memory", largest, needed, machine.memory, [*remedies, "smaller batches", "a larger machine"])
    largest = max(steps, key=lambda step: step.device)
    if largest.device > machine.gpu:
        yield _short("GPU memory", largest, largest.device, machine.gpu, ["smaller batches", "device=cpu"])
    for setting in ("artifacts", "results"):
        root = Path(cell.cfg[setting])
        free, wanted = 0, 0
        for step in steps:
            written = step.disk if step.artifact is not None and step.artifact[0].root == root else 0
            scratch = step.scratch if setting == "artifacts" else 0
            free = min(free, machine.free_after(written, root) - scratch)
            wanted += written + scratch
        if free < 0 and wanted:
            yield f"the disk of {setting}={root} lacks {size(-free)}; free some, or use {setting}=FOLDER on another"


def _short(of: str, step: Step, needed: int, available: int, remedies: Sequence[str]) -> str:
    return (
        f"{step.name} needs {size(needed)} of {of}, {size(needed - available)} more than is available; "
        f"use {', '.join(remedies[:-1])} or {remedies[-1]}"
    )


def size(count: int) -> str:
    """Bytes in decimal units: 13.5 GB."""
    unit, value = "kB", count / 1e3
    for larger in ("MB", "GB", "TB"):
        if value >= 1000:
            unit, value = larger, value / 1000
    return f"{value:.3g} {unit}"
