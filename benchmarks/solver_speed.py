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

import json
from collections.abc import Sequence

import torch
from llama7b import RATIOS, options, rank, scaled
from timing import fastest, rounded
from torch import Tensor

from lowrank_lab.lowrank.solver import decompose


def problem(out: int, inp: int) -> tuple[Tensor, Tensor]:
    """A random weight, and the second moment of inputs whose channels differ as those of real models do."""
    scales = torch.randn(inp, dtype=torch.float64).exp()
    inputs = torch.randn(2 * inp, inp, dtype=torch.float64) * scales
    return torch.randn(out, inp, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def ours(weight: Tensor, metric: Tensor) -> None:
    spectrum = decompose(weight, metric, None)
    for ratio in RATIOS:
        spectrum.factors(weight, rank(ratio, *weight.shape))


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
    asked = options(arguments, repeats=1)
    torch.manual_seed(0)
    total: dict[str, float] = {}
    for out, inp in scaled(asked.scale):
        took = measure(out, inp, asked.repeats)
        total = {name: total.get(name, 0.0) + value for name, value in took.items()}
        print(json.dumps({"out": out, "in": inp, **ratios(took)}), flush=True)
    print(json.dumps({"shapes": "all", **ratios(total)}))


if __name__ == "__main__":
    main()
