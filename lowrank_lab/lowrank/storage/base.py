"""What a storage is given and what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowrank_lab.lowrank.ranks import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class Storage(Protocol):
    """``counts`` is what ``cost_per_rank`` counts, as tables show it: "weights" or "16-bit words"."""

    counts: str

    def cost_per_rank(self, out: int, inp: int) -> int:
        """What one rank of an (out, in) matrix costs, in numbers as large as those of the dense matrix."""
        ...

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        """Replace the dense members of ``site`` by its factors.

        ``left`` (out, k) and ``right`` (k, in), float64, have all of the ``singular_values`` (k,) in ``right``.
        """
        ...
