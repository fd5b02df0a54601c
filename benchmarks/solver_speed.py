"""Is one eigendecomposition for all ratios faster than singular value decompositions?

    OMP_NUM_THREADS=1 python benchmarks/solver_speed.py              # shapes of LLaMA-7B at a quarter: a minute
    OMP_NUM_THREADS=1 python benchmarks/solver_speed.py --scale 1    # as they are: half an hour

For the three shapes of LLaMA-7B, with a second moment as the metric: our solver, with the factors at three
ratios, over ``torch.linalg.svd`` of W times a root of the metric, which is what the papers' code decomposes.
Neither making that root nor the factors counts for the SVD. One SVD can serve three ratios, though the papers'
code has one for each: printed is how many times faster we are than one and than three, in float64 as our solver
and in float32 as the papers' code. A line a shape, and last the sums over the shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from timing import fastest, rounded
from torch import Tensor

from lowrank_lab.lowrank.solver import decompose

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in) of q k v o, of gate and up, of down
RATIOS = (0.8, 0.6, 0.4)


def problem(out: int, inp: int) -> tuple[Tensor, Tensor]:
    """A random weight, and the second moment of inputs whose channels differ as those of real models do."""
    scales = torch.randn(inp, dtype=torch.float64).exp()
    inputs = torch.randn(2 * inp, inp, dtype=torch.float64) * scales
    return torch.randn(out, inp, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def ours(weight: Tensor, metric: Tensor) -> None:
    spectrum = decompose(weight, metric, None)
    out, inp = weight.shape
    for ratio in RATIOS:
        spectrum.factors(weight, int(ratio * out * inp / (out + inp)))


def measure(out: int, inp: int, repeats: int) -> dict[str, float]:
    """Processor seconds by what was done."""
    weight, metric = problem(out, inp)
    double = weight @ torch.linalg.cholesky(metric)
    single = double.float()
    calls = {
        "ours": lambda: ours(weight, metric),
        "svd_float64": lambda: torch.linalg.svd(double, full_matrices=False),
        "svd_float32": lambda: torch.linalg.svd(single, full_matrices=False),
    }
    return fastest(calls, repeats)


def ratios(took: dict[str, float]) -> dict[str, object]:
    one = {f"{name}_over_ours": took[name] / took["ours"] for name in ("svd_float64", "svd_float32")}
    return rounded({**took, **one, **{f"3_{name}": 3 * value for name, value in one.items()}})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.25, help="of the widths")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    total: dict[str, float] = {}
    for shape in SHAPES:
        out, inp = (round(width * options.scale) for width in shape)
        took = measure(out, inp, options.repeats)
        total = {name: total.get(name, 0.0) + value for name, value in took.items()}
        print(json.dumps({"out": out, "in": inp, **ratios(took)}), flush=True)
    print(json.dumps({"shapes": "all", **ratios(total)}))


if __name__ == "__main__":
    main()
