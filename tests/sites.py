"""Sites for tests: of bare shapes, and of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from lowrank_lab.cells.targets import Grouping, Targets, sites_of
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.base import Storage
from lowrank_lab.models.families import Tower
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.site import Site


def site(out: int, inp: int, name: str = "linear", storage: Storage | None = None, block: int = 0) -> Site:
    return Site(block, (name,), (out,), inp, out * inp, partial((storage or Absorb(0.5)).cost, out, inp))


def sites(shapes: Mapping[str, tuple[int, int]]) -> dict[str, Site]:
    return {name: site(out, inp, name) for name, (out, inp) in shapes.items()}


def sites_in(
    model: nn.Module,
    tower: Tower,
    joint: Sequence[str] = (),
    linears: str = "all",
    ratio_of: str = "parameters",
    storage: Storage | None = None,
) -> dict[str, Site]:
    answers = (Grouping(joint), Targets(linears, ratio_of), storage or Absorb(0.5))
    return sites_of(tower, linear_shapes(model, tower), *answers)
