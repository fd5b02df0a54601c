"""What a metric is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

# (C, R): input side (in,) or (in, in), output side (out,) or (out, out); None is the identity.
Weights: TypeAlias = "tuple[Tensor | None, Tensor | None]"


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs x of a linear over all calibration tokens, float64.

    tokens         how many inputs were seen
    second_moment  (in, in)  mean of x xᵀ
    abs_mean       (in,)     mean of |x|
    abs_max        (in,)     maximum of |x|
    """

    tokens: int
    second_moment: Tensor
    abs_mean: Tensor
    abs_max: Tensor


@dataclass(frozen=True)
class OutputStatistics:
    """Statistics of the output gradients g = dL/dy of a linear over all calibration tokens, float64.

    tokens      how many outputs were seen
    square      (out,)      mean of g² over tokens
    row_fisher  (out,)      mean over sequences of Σ_j (dL/dW_ij)², the Fisher information of each row of W
    outer       (out, out)  mean of g gᵀ over tokens; only where the metric asks for it
    """

    tokens: int
    square: Tensor
    row_fisher: Tensor
    outer: Tensor | None


class Metric(Protocol):
    """A pure function of the statistics that it asks for; what it does not ask for is None.

    needs_inputs     the statistics of the inputs, from a forward pass
    needs_gradients  those of the output gradients, from a backward pass
    needs_outer      of these, the mean of g gᵀ as well
    """

    needs_inputs: bool
    needs_gradients: bool
    needs_outer: bool

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights: ...
