"""The same ratio for every linear."""

from __future__ import annotations

from lowrank_lab.allocation.base import Ranks, Shapes, Tails
from lowrank_lab.lowrank.ranks import rank_for_ratio


class Uniform:
    needs_tails = False

    def __call__(self, shapes: Shapes, ratio: float, tails: Tails | None) -> Ranks:
        return {name: rank_for_ratio(out, inp, ratio) for name, (out, inp) in shapes.items()}
