"""Both sides: how large the inputs are, and how much the loss depends on the outputs."""

from __future__ import annotations

from typing import Literal

from lowrank_lab.basics import checks
from lowrank_lab.lowrank.metric.base import InputStatistics, OutputStatistics, Weights


class FisherKron:
    """C = mean of x xᵀ and R = mean of g gᵀ, whole or its diagonal.

    A change ΔW moves the loss by about Σ gᵀ ΔW x; were x and g independent, the mean square of a token's share
    would be trace(R ΔW C ΔWᵀ). It is the Kronecker-factored Fisher information (Martens and Grosse 2015) as a
    metric for truncation. Since it is measured in units of the loss, its errors compare between layers.
    """

    needs_inputs = True
    needs_gradients = True

    def __init__(self, output: Literal["diagonal", "full"]) -> None:
        checks.one_of(("diagonal", "full"), output=output)
        self.needs_outer = output == "full"

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights:
        assert inputs is not None
        assert outputs is not None
        return inputs.second_moment, outputs.outer if self.needs_outer else outputs.square
