"""The sweeper of run.py. Hydra finds its plugins in packages of this name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_lab.cells.hydra_private import basic_sweeper
from lowrank_lab.cells.sweep import jobs


class PlannedSweeper(basic_sweeper.BasicSweeper):
    """Hydra's basic sweeper for a grid that run.py has planned: each of its cells has been composed and checked."""

    def __init__(self, also: Sequence[Mapping[str, Any]] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.also = also

    def split_arguments(self, overrides: list[Any], max_batch_size: int | None) -> list[list[list[str]]]:
        """The jobs in the order of the plan; ``overrides`` are those of ``params`` and then the command line's."""
        words = [str(override.input_line) for override in overrides[len(self.params) :]]
        planned = jobs(self.params, self.also, words)
        return [list(batch) for batch in self.split_overrides_to_chunks(planned, max_batch_size)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: composing every job once more would take minutes for hundreds of them."""
