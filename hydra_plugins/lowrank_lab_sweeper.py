"""The sweeper of run.py. Hydra finds its plugins in packages of this name."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_lab.cells.hydra_private import basic_sweeper


class PlannedSweeper(basic_sweeper.BasicSweeper):
    """Hydra's basic sweeper for a grid that run.py has planned: each of its cells has been composed and checked."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: composing every job once more would take minutes for hundreds of them."""
