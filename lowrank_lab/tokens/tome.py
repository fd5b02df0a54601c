"""Token merging, without training (ToMe: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.compression import Compression, Plan

if TYPE_CHECKING:
    from lowrank_lab.modules import token_merging
    from lowrank_lab.running.context import Context
else:
    token_merging = LazyModule("lowrank_lab.modules.token_merging")

VERSION = 1  # raise it when the same settings merge other tokens


class ToMe(Compression):
    """In every block, the r most similar pairs of tokens become one between attention and MLP.

    It comes after the other compressions, which are calibrated on all tokens.

    r                       how many tokens a block merges; never more than half of the patches that it has
    schedule                ``constant``: r in every block; ``decreasing``: from 2r in the first to 0 in the last
    proportional_attention  whether attention counts a token as often as it has patches (Eq. 1): for models that
                            were trained without it. The paper leaves it out for those fine-tuned from MAE
    """

    axis = "tokens"
    kind = "merged tokens"
    kind_in_words = "a model that merges tokens"
    in_name = ("r", "schedule", "proportional_attention")

    def __init__(self, r: int, schedule: Literal["constant", "decreasing"], proportional_attention: bool) -> None:
        checks.whole(0, r=r)
        checks.one_of(("constant", "decreasing"), schedule=schedule)
        checks.flag(proportional_attention=proportional_attention)
        self.r = r
        self.schedule = schedule
        self.proportional_attention = proportional_attention

    @property
    def name(self) -> str:
        parts = [f"ToMe r={self.r}", "decreasing" if self.schedule == "decreasing" else ""]
        parts.append("" if self.proportional_attention else "unweighted")
        return " ".join(part for part in parts if part)

    @property
    def family(self) -> str:
        return "ToMe"

    @property
    def online(self) -> bool:
        return True

    def check_cell(self, cell: Cell) -> None:
        """Raises UserError for a checkpoint that merges tokens already."""
        kind = "token_merging"  # of modules/token_merging.py, which needs torch
        if cell.saved is not None and any(module["kind"] == kind for module in cell.saved.modules.values()):
            raise UserError(f"model.path={cell.cfg.model.path} merges tokens already; use tokens=none")

    def key(self, cell: Cell, before: str) -> str:
        return fingerprint({"model": before, "tokens": config.for_key(cell.cfg.tokens), "version": VERSION})

    def check(self, context: Context) -> None:
        """Raises SkippedCell where the model has no tokens of images, or its blocks are of another kind."""
        if context.tower.halves is None:
            raise SkippedCell(
                "tokens=tome merges tokens of images between attention and MLP; this architecture has none, or "
                "it is not known where that is"
            )

    def plan(self, context: Context) -> Plan:
        """How many tokens each block is to merge, by its name."""
        blocks = context.family.config(context.model_config).num_hidden_layers
        return {f"{context.tower.blocks}.{index}": r for index, r in enumerate(self.schedule_of(blocks))}

    def schedule_of(self, blocks: int) -> list[int]:
        """The number for each of so many blocks (ToMe, §4.1)."""
        if self.schedule == "constant" or blocks == 1:
            return [self.r] * blocks
        return [2 * self.r * (blocks - 1 - index) // (blocks - 1) for index in range(blocks)]

    def apply(self, context: Context, plan: Plan) -> dict[str, Any]:
        """Change the forward of every block; the weights stay, and the record's sizes have the tokens."""
        token_merging.merge_tokens(context.model, context.tower, list(plan.values()), self.proportional_attention)
        return {}
