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


class Metric(Protocol):
    """A pure function of the input statistics. ``needs_calibration`` is False where it ignores them."""

    needs_calibration: bool

    def __call__(self, statistics: InputStatistics | None) -> Weights: ...
