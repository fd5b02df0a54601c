"""Statistics of one linear over the calibration data. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs x of a linear over all calibration tokens, float64.

    tokens         the number of inputs
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

    tokens      the number of outputs
    square      (out,)      mean of g² over tokens
    row_fisher  (out,)      mean over sequences of Σ_j (dL/dW_ij)², the Fisher information of each row of W
    outer       (out, out)  mean of g gᵀ over tokens; only where the metric needs it
    """

    tokens: int
    square: Tensor
    row_fisher: Tensor
    outer: Tensor | None
