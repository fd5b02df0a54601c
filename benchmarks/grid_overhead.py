"""How much longer does a grid take than the forwards that it cannot do without?

    OMP_NUM_THREADS=1 python benchmarks/grid_overhead.py

Three methods at three ratios on the embedded model (or any words of run.py), in this process, with empty
results but a converted model. What no implementation avoids: one forward of the calibration tokens through the
blocks, and for each cell one of the evaluation tokens through its compressed model. These are timed in the same
run, through linears of the ranks that the cells had. Prints these processor seconds for each cell, their sums
and the ratio, and the share of each stage in the grid.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import rounded, seconds

from lowrank_lab.cells import grid
from lowrank_lab.cells.cell import Cell
from lowrank_lab.modules.factorized import FactorizedLinear, plain_linear
from lowrank_lab.records.results import Record
from lowrank_lab.running import runner
from lowrank_lab.running.context import Context

CONF = Path(__file__).resolve().parent.parent / "conf"
METHODS = ("svd", "asvd_uniform", "svdllm")
RATIOS = (0.8, 0.6, 0.4)
SIZES = ("eval.ppl.seqlen=512", "eval.ppl.max_windows=16", "calibration.samples=16", "calibration.seqlen=512")


def plan(words: Sequence[str], *more: str) -> list[Cell]:
    return grid.plan(CONF, "config", [*SIZES, *words, *more], multirun=True)


@torch.no_grad()
def forwards(cell: Cell, ranks: dict[str, int]) -> tuple[float, float]:
    """Seconds of a forward of the calibration tokens through the dense blocks, and of one of the evaluation tokens
    through the whole model with linears of these ranks."""
    bench = Context(cell, Record(cell, None), torch.device("cpu"))
    bench.evaluator, evaluator = "ppl", cell.evaluators["ppl"]
    windows, _ = evaluator.windows(bench)
    calibration = bench.calibration_ids.split(cell.cfg.calibration.batch_size)
    model: Any = bench.model
    dense = seconds(lambda: [model.model(ids) for ids in calibration])
    for name, rank in ranks.items():
        out, inp = model.get_submodule(name).weight.shape
        left, right = torch.randn(out, rank) / out**0.5, torch.randn(rank, inp) / inp**0.5
        model.set_submodule(name, FactorizedLinear(plain_linear(left, None), plain_linear(right, None)))
    return dense, seconds(lambda: [model(ids) for ids in windows.split(evaluator.batch_size)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="of run.py, for another model or other sizes")
    words = parser.parse_args(arguments).words
    with tempfile.TemporaryDirectory() as results:
        words = [*words, f"results={results}", f"method={','.join(METHODS)}", f"ratio={','.join(map(str, RATIOS))}"]
        for cell in plan(words, "method=dense", "ratio=1", "eval.ppl.max_windows=1"):
            runner.run(cell)  # converts the model
        stages: Counter[str] = Counter()
        took, unavoidable = 0.0, 0.0
        for number, cell in enumerate(plan(words)):
            record: dict[str, Any] = {}
            of_cell = seconds(lambda cell=cell, record=record: record.update(runner.run(cell)))
            for stage in record["stages"]:
                stages[stage["stage"]] += stage["seconds"]
            of_calibration, of_evaluation = forwards(cell, record["compressions"]["lowrank"]["plan"])
            took += of_cell
            unavoidable += of_evaluation + (of_calibration if number == 0 else 0)
            line = {"calibration_forward": of_calibration, "evaluation_forward": of_evaluation}
            print(json.dumps({"cell": cell.label, **rounded({"seconds": of_cell, **line})}), flush=True)
    shares = {stage: part / stages.total() for stage, part in stages.most_common() if part > 0}
    print(json.dumps(rounded({"grid": took, "unavoidable": unavoidable, "ratio": took / unavoidable})))
    print(json.dumps({"shares": rounded(shares)}))


if __name__ == "__main__":
    main()
