"""The interface of a storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class Storage(Protocol):
    """``counts`` is what ``cost`` counts, as tables show it: "weights" or "16-bit words"."""

    counts: str

    def cost(self, out: int, inp: int, rank: int) -> int:
        """What an (out, in) matrix costs at ``rank``, in numbers as large as the out · in of the dense matrix.

        It never falls as the rank rises from 0 to min(out, in), and is above 0 from rank 1 on.
        """
        ...

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        """Replace the dense members of ``site`` by its factors.

        ``left`` (out, k) and ``right`` (k, in), float64, have all of the ``singular_values`` (k,) in ``right``.
        """
        ...
