"""Which linears an evaluator looks at, chosen by role, path and block. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells.targets import Grouping, Targets, sites_of
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import Tower
from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from torch import nn

    from lowrank_lab.models import walk
    from lowrank_lab.modules import linears as linear_modules
else:
    walk = LazyModule("lowrank_lab.models.walk")
    linear_modules = LazyModule("lowrank_lab.modules.linears")


def chosen_sites(
    model: nn.Module,
    tower: Tower,
    linears: Sequence[str] | None,
    blocks: Sequence[int] | None,
    setting: str,
) -> dict[str, Site]:
    """The linears of ``linears`` (roles or paths; None: all) in ``blocks`` (None: the first, middle and last).

    By full name, in the order of the model. Raises UserError for one that the model does not have, with the
    ``setting`` that names it.
    """
    count = len(walk.blocks_of(model, tower))
    blocks = (0, count // 2, count - 1) if blocks is None else blocks
    named = {**{name: (name,) for name in tower.linears}, **tower.roles}
    wanted: set[str] = set()
    for name in tower.linears if linears is None else linears:
        if name not in named:
            raise UserError(f"{setting}.linears={name}: this model has {', '.join(named)}")
        wanted.update(named[name])
    for index in blocks:
        if index >= count:
            raise UserError(f"{setting}.blocks={index}: this model has the blocks 0 to {count - 1}")
    shapes = linear_modules.linear_shapes(model, tower)
    each = sites_of(tower, shapes, Grouping(()), Targets("all", "parameters"), Absorb(0.5))
    return {name: site for name, site in each.items() if site.block in blocks and site.key in wanted}
