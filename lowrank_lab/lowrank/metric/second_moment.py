"""SVD-LLM: the error of the outputs, ‖(W − W') X‖, over the calibration tokens (papers/001)."""

from __future__ import annotations

from lowrank_lab.basics import checks
from lowrank_lab.lowrank.metric.base import InputStatistics, OutputStatistics, Weights


class SecondMoment:
    """C = mean of x xᵀ.

    SVD-LLM whitens with the Cholesky factor S of Σ x xᵀ = S Sᵀ, its v2 with the root from the eigenvectors of
    Σ x xᵀ. Any root of C gives the same W', and dividing by the number of tokens only rescales the error to one per
    token.

    cholesky  compute the same W' in the authors' way, for an ablation: it inverts S, so that a C without full rank
              first has to be made regular
    """

    needs_inputs = True
    needs_gradients = False
    needs_outer = False

    def __init__(self, cholesky: bool) -> None:
        checks.flag(cholesky=cholesky)
        self.cholesky = cholesky

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights:
        assert inputs is not None
        return inputs.second_moment, None
