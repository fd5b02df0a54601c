"""What an allocation is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np

# By the full name of a linear: its (out, in); its squared error at every rank 0 … min(out, in), float64; its
# rank, None where it stays dense.
Shapes: TypeAlias = "Mapping[str, tuple[int, int]]"
Tails: TypeAlias = "Mapping[str, np.ndarray]"
Ranks: TypeAlias = "dict[str, int | None]"


class Allocation(Protocol):
    """Spends ``ratio`` of the parameters of all linears. Raises SkippedCell where that leaves no rank."""

    needs_tails: bool

    def __call__(self, shapes: Shapes, ratio: float, tails: Tails | None) -> Ranks: ...
