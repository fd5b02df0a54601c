"""The sizes that follow from the ranks of a model's sites: the ratio reached, and the savings of cached latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank_lab.models.families import Tower, kv_cache_values_per_token
from lowrank_lab.models.vision_families import language_config
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.base import rank_of
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.site import Sites, members_in


def sizes_of_ranks(
    model: nn.Module, tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None], ratio: float
) -> dict[str, Any]:
    """The requested and the reached sizes; ``tower`` is None where nothing is compressed.

    ratio_reached            of what the ratio counts (parameters, 16-bit words, cached values)
    kv_latent_bytes_per_token  in the model's dtype, if the latent of each key and value projection were cached
                             instead of its output, where it is narrower (ASVD §3.4; a latent that both share counts
                             once); None where they are fused with the queries
    hardware_cost            QSVD's R1, the fraction kept of the parameters (and so of the multiply-accumulates) of
                             the query, key and value projections, and R2, of the cached values if latents were:
                             with one latent for all three r (E + q + k + v) / E (q + k + v) and r / (k + v)
    """
    _check(model, tower, sites, ranks)
    dtype: Any = model.dtype
    dense = sum(site.dense for site in sites.values())
    cost = sum(site.cost(ranks[name]) for name, site in sites.items())
    cached = kv_cache_values_per_token(language_config(model.config))
    latent = None
    if cached is not None and (tower is None or "kv" in tower.roles):
        latent = cached - _latent_saves(tower, sites, ranks)
    return {
        "ratio_asked": ratio,
        "ratio_reached": cost / dense if sites else 1.0,
        "kv_latent_bytes_per_token": None if latent is None else latent * dtype.itemsize,
        "hardware_cost": {
            "r1": _kept_of_qkv(model, tower, sites),
            "r2": None if latent is None or cached is None else latent / cached,
        },
    }


def _check(model: nn.Module, tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None]) -> None:
    """Check that every linear that knows its rank has the planned one."""
    for name, site in sites.items():
        assert tower is not None
        block = blocks_of(model, tower)[site.block]
        for member in site.members:
            rank = rank_of(block.get_submodule(member))
            assert rank in (None, ranks[name]), f"{name} has rank {rank} instead of {ranks[name]}"


def _kept_of_qkv(model: nn.Module, tower: Tower | None, sites: Sites) -> float | None:
    """The fraction kept of the parameters of all query, key and value projections, compressed or not.

    None for a model without them.
    """
    if tower is None:
        return 1.0
    if "qkv" not in tower.roles:
        return None
    blocks, roles = blocks_of(model, tower), set(tower.roles["qkv"])
    in_sites = {place: site for place, (_, site) in members_in(sites).items() if place[1] in roles}
    saved = sum(
        math.prod(site.shapes[member]) - count(blocks[index].get_submodule(member)).parameters
        for (index, member), site in in_sites.items()
    )
    projections = [block.get_submodule(name) for block in blocks for name in tower.roles["qkv"]]
    kept = sum(count(projection).parameters for projection in projections)
    return kept / (kept + saved)


def _latent_saves(tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None]) -> int:
    """How many values a token the latents of key and value projections have less than their outputs."""
    saved = 0
    for name, site in sites.items():
        rank = ranks[name]
        assert tower is not None
        keys_values = tower.roles["kv"]
        cached = sum(out for member, out in site.own_outs.items() if member in keys_values)
        if rank is not None:
            saved += max(0, cached - rank)
    return saved
