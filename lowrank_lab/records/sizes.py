"""The sizes of a compressed model, counted on its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank_lab.models.families import Tower, kv_cache_shape, kv_cache_values_per_token
from lowrank_lab.models.vision_families import language_config
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.attention import cache_of
from lowrank_lab.modules.base import nbytes
from lowrank_lab.modules.counts import bytes_of_parts, count, macs_of_token, parameters
from lowrank_lab.modules.rebuild import check_description
from lowrank_lab.modules.site import Sites, members_in


def sizes(model: nn.Module, tower: Tower | None, sites: Sites) -> dict[str, Any]:
    """The sizes of the model and of the linears of ``sites``; ``tower`` is None where nothing is compressed.

    parameters, bytes        of the whole model, tied tensors once; scales and zero points count as bytes alone
    sites                    of the compressed linears without biases: ``parameters`` now and dense, whatever their
                             bits; ``bytes`` with scales and with the tensors of steps before linears
    macs_per_token           multiply-accumulates of all linear layers with lm_head, without attention products; of
                             images and text without the image encoder and projector
    kv_cache_bytes_per_token keys and values of all layers in the model's dtype, or in few bits with their scales;
                             None for a model that caches something else
    """
    members = _members(model, tower, sites)
    return {
        "parameters": parameters(model),
        "bytes": nbytes(*model.parameters()),
        "sites": {
            "count": len(sites),
            "parameters_dense": sum(site.parameters(None) for site in sites.values()),
            "parameters": sum(count(member).parameters for member in members),
            "bytes": bytes_of_parts(model, members),
        },
        "macs_per_token": macs_of_token(model),
        "kv_cache_bytes_per_token": _cache_bytes(model),
    }


def _cache_bytes(model: Any) -> int | None:
    """The bytes of the keys and values of a token."""
    config, cache = language_config(model.config), cache_of(model)
    shape, values = kv_cache_shape(config), kv_cache_values_per_token(config)
    if shape is None or values is None:
        return None
    return values * model.dtype.itemsize if cache is None else cache.bytes_per_token(*shape)


def _members(model: nn.Module, tower: Tower | None, sites: Sites) -> list[nn.Module]:
    """The linears of ``sites``, dense or compressed."""
    dtype: Any = model.dtype
    members = []
    for (index, name), (_, site) in members_in(sites).items():
        assert tower is not None
        member = blocks_of(model, tower)[index].get_submodule(name)
        check_description(member, torch.empty(site.shapes[name], dtype=dtype, device="meta"))
        members.append(member)
    return members
