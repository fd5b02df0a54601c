"""Which linears of a model a cell quantizes."""

from __future__ import annotations

from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.site import by_block, members_in
from lowrank_lab.running.context import Context


def members_by_block(context: Context) -> list[list[str]]:
    """The linears that the cell targets, by block: names within it."""
    of_blocks = by_block(context.sites, len(blocks_of(context.model, context.tower)))
    return [[member for _, member in members_in(sites)] for sites in of_blocks]
