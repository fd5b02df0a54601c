"""ASVD: each input channel weighted by how large its activations are (papers/002, §3.3)."""

from __future__ import annotations

from typing import Literal

from lowrank_lab.basics import checks
from lowrank_lab.lowrank.metric.base import InputStatistics, OutputStatistics, Weights


class ActivationScale:
    """C = diag(s^2α), with s the mean or the maximum of |x| of a channel.

    The paper scales W by S = diag(s^α) before its SVD (Eqs. 3 and 4), that is, it minimises ‖(W − W') S‖, so
    C = S². A channel that is always zero gets no weight; nothing is inverted, so that is no failure.
    """

    needs_inputs = True
    needs_gradients = False
    needs_outer = False

    def __init__(self, statistic: Literal["abs_mean", "abs_max"], alpha: float) -> None:
        checks.one_of(("abs_mean", "abs_max"), statistic=statistic)
        if not checks.is_number(alpha) or alpha < 0:
            raise ValueError(f"alpha={alpha} is not valid; it must be a number from 0")
        self.statistic = statistic
        self.alpha = alpha

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights:
        assert inputs is not None
        scale = inputs.abs_mean if self.statistic == "abs_mean" else inputs.abs_max
        return scale ** (2 * self.alpha), None
