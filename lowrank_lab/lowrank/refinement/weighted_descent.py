"""Weighted SVD (papers/000): every weight has an importance of its own, so the factors are found by descent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.modules.site import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class WeightedDescent:
    """Minimise Σ a²ᵢⱼ (W − W')²ᵢⱼ over the factors of W', from the closed form's on.

    The importance is that of the first-order change L(w) − L(w') ≈ dL/dw (w − w'): a² = mean over the calibration
    sequences of (dL/dW)². The method (weighted_error.py) is gradient descent with an exact step for each row.

    steps  of each site; one moves both factors
    floor  added to a², as a fraction of its mean over the site: a weight without a gradient in any calibration
           sequence is then still held near its value, and no problem is singular
    """

    needs_calibration = True
    needs_weight_fisher = True

    def __init__(self, steps: int, floor: float) -> None:
        checks.whole(0, steps=steps)
        checks.above(0, floor=floor)
        self.steps = steps
        self.floor = floor

    def prepare(self, context: Context) -> None:
        _ = context.weight_fisher

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        from lowrank_lab.lowrank.refinement.weighted_error import refine

        refine(context, ranks, folder, self.steps, self.floor)
