"""What evaluators check that change the ranks of a cell's dense model themselves. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.errors import SkippedCell

if TYPE_CHECKING:
    from lowrank_lab.lowrank.ranks import Ranks
    from lowrank_lab.running.context import Context


def check_low_rank_alone(context: Context, evaluator: str) -> None:
    """Raises SkippedCell where the cell's compression is not low rank alone: the others would not be measured."""
    if list(context.cell.compressions) != ["lowrank"]:
        raise SkippedCell(f"eval={evaluator} needs a low-rank method without pruning and quantization")


def ranks_of(context: Context) -> Ranks:
    """The ranks that the cell's model has been given."""
    ranks: Ranks = context.record.data["compressions"]["lowrank"]["plan"]
    return ranks
