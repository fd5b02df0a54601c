"""Weighted SVD (papers/000): every weight has an importance of its own, so the factors are found by descent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.lowrank.ranks import Ranks

if TYPE_CHECKING:
    from lowrank_lab.bench import Bench


class WeightedDescent:
    """Minimise Σ a²ᵢⱼ (W − W')²ᵢⱼ over the factors of W', from the closed form's on.

    The importance is that of the first-order change L(w) − L(w') ≈ dL/dw (w − w'): a² = mean over the calibration
    sequences of (dL/dW)². The method (weighted_error.py) is gradient descent with an exact step for each row.

    steps  of each site; one moves both factors
    floor  added to a², as a fraction of its mean over the site: a weight without a gradient in any calibration
           sequence is then still held near its value, and no problem is singular
    """

    needs_calibration = True

    def __init__(self, steps: int, floor: float) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"steps={steps} is not valid; it must be a whole number from 0")
        if not isinstance(floor, (int, float)) or isinstance(floor, bool) or not 0 < floor < float("inf"):
            raise ValueError(f"floor={floor} is not valid; it must be a number above 0")
        self.steps = steps
        self.floor = floor

    def __call__(self, bench: Bench, ranks: Ranks, folder: Path) -> None:
        from lowrank_lab.refinement.weighted_error import refine

        refine(bench, ranks, folder, self.steps, self.floor)
