"""The interface of a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from lowrank_lab.calibration.summaries import InputStatistics, OutputStatistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["InputStatistics", "Metric", "OutputStatistics", "Weights"]

# (C, R): input side (in,) or (in, in), output side (out,) or (out, out); None is the identity.
Weights: TypeAlias = "tuple[Tensor | None, Tensor | None]"


class Metric(Protocol):
    """A pure function of the statistics that it needs. It is called with None for the others.

    needs_inputs     the statistics of the inputs, from a forward pass
    needs_gradients  those of the output gradients, from a backward pass
    needs_outer      of these, the mean of g gᵀ as well
    """

    needs_inputs: bool
    needs_gradients: bool
    needs_outer: bool

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights: ...
