"""How long does it take until the work begins?

    OMP_NUM_THREADS=1 python benchmarks/startup.py

Processor seconds of ``python run.py`` for a tiny cell that is finished, beside a Python that does nothing and
one that imports hydra; and of planning a grid (every cell composed, checked and with its keys) for each cell,
over what hydra needs to compose that cell alone: once with many ratios and seeds, once with two ratios of every
method.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from timing import rounded, seconds

from lowrank_lab.cells import grid
from lowrank_lab.running import runner

REPOSITORY = Path(__file__).resolve().parent.parent
CONF = REPOSITORY / "conf"
CELL = ("model=tiny", "method=dense", "eval.ppl.seqlen=64", "eval.ppl.max_windows=2")
METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
GRIDS = {
    "ratios": ("method=svd,asvd_uniform,svdllm", "ratio=0.9,0.8,0.7,0.6,0.5,0.4", "seed=0,1,2"),
    "methods": (f"method={','.join(METHODS)}", "ratio=0.8,0.6"),
}


def child_seconds(arguments: Sequence[str], repeats: int) -> float:
    """Processor seconds of the fastest of some runs of Python with these arguments."""
    took = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)


def of_a_finished_cell(results: str, repeats: int) -> dict[str, float]:
    words = [*CELL, f"results={results}"]
    [cell] = grid.plan(CONF, "config", words, multirun=False)
    runner.run(cell)
    took = {
        "python": child_seconds(["-c", "pass"], repeats),
        "import_hydra": child_seconds(["-c", "import hydra"], repeats),
        "finished_cell": child_seconds(["run.py", *words], repeats),
    }
    return {**took, "over_import_hydra": took["finished_cell"] / took["import_hydra"]}


def of_a_grid(words: Sequence[str], results: str) -> dict[str, float]:
    cells: list[object] = []
    words = ["model=tiny", f"results={results}", *words]
    planned = seconds(lambda: cells.extend((cell, cell.key) for cell in grid.plan(CONF, "config", words, True)))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        first = [word.split(",")[0] for word in words]
        composed = min(seconds(lambda: compose("config", first, True)) for _ in range(5))
    each = planned / len(cells)
    return {"cells": len(cells), "seconds_a_cell": each, "hydra": composed, "over_hydra": each / composed}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(arguments).repeats
    with tempfile.TemporaryDirectory() as results:
        print(json.dumps(rounded(of_a_finished_cell(results, repeats))))
        for name, words in GRIDS.items():
            print(json.dumps({"grid": name, **rounded(of_a_grid(words, results))}))


if __name__ == "__main__":
    main()
