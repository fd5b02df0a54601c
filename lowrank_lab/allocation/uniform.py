"""The same ratio for every linear."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_lab.lowrank.ranks import rank_for_ratio


class Uniform:
    def __call__(self, shapes: Mapping[str, tuple[int, int]], ratio: float) -> dict[str, int | None]:
        """Ranks by linear; None keeps it dense. ``shapes`` are (out, in)."""
        return {name: rank_for_ratio(out, inp, ratio) for name, (out, inp) in shapes.items()}
