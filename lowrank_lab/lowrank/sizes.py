"""What a compressed model weighs, counted on its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.lowrank.mixed import MixedLinear
from lowrank_lab.lowrank.ranks import Site, Sites, total_cost
from lowrank_lab.models.arch import ArchSpec, kv_cache_values_per_token
from lowrank_lab.models.walk import blocks_of


def sizes(
    model: nn.Module, spec: ArchSpec | None, sites: Sites, ranks: Mapping[str, int | None], ratio: float
) -> dict[str, Any]:
    """What was asked for and what came out.

    ratio_reached            of what the ratio counts (parameters, 16-bit words, cached values)
    parameters, bytes        of the whole model; tied tensors count once
    sites                    of what is compressed, biases apart: ``parameters`` now and dense, whatever their
                             bits; ``bytes`` with the scales of quantized tensors
    macs_per_token           multiply-accumulates of all linear layers with lm_head, attention products apart
    kv_cache_bytes_per_token keys and values of all layers in the model's dtype
    kv_latent_bytes_per_token  the same if the latent of each key and value projection were cached instead of its
                             output, where it is narrower (ASVD §3.4; a latent that both share counts once); None
                             where they are fused with the queries
    """
    tensors = list(model.parameters())
    value_bytes = model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    of_sites = [tensor for site in sites.values() for tensor in _weights(model, spec, site)]
    parameters = sum(site.parameters(ranks[name]) for name, site in sites.items())
    counted = sum(tensor.numel() for name, tensor in of_sites if name != "scale")
    assert counted == parameters, "the tensors do not have the planned ranks"
    dense = sum(site.dense for site in sites.values())
    cached = kv_cache_values_per_token(model.config)
    return {
        "ratio_asked": ratio,
        "ratio_reached": total_cost(sites, ranks) / dense if sites else 1.0,
        "parameters": sum(p.numel() for p in tensors),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "sites": {
            "count": len(sites),
            "parameters_dense": sum(site.parameters(None) for site in sites.values()),
            "parameters": parameters,
            "bytes": sum(tensor.numel() * tensor.element_size() for _, tensor in of_sites),
        },
        "macs_per_token": _macs_per_token(model),
        "kv_cache_bytes_per_token": cached * value_bytes,
        "kv_latent_bytes_per_token": None
        if spec is not None and "kv" not in spec.roles
        else (cached - _latent_saves(spec, sites, ranks)) * value_bytes,
    }


def _weights(model: nn.Module, spec: ArchSpec | None, site: Site) -> list[tuple[str, nn.Parameter]]:
    """The tensors of a site without its biases, by the last part of their names."""
    assert spec is not None
    block = blocks_of(model, spec)[site.block]
    named = [item for member in site.members for item in block.get_submodule(member).named_parameters()]
    return [(name.split(".")[-1], tensor) for name, tensor in named if not name.endswith("bias")]


def _latent_saves(spec: ArchSpec | None, sites: Sites, ranks: Mapping[str, int | None]) -> int:
    """How many values a token fewer the latents of the key and value projections are than their outputs."""
    saved = 0
    for name, site in sites.items():
        rank = ranks[name]
        assert spec is not None
        keys_values = spec.roles["kv"]
        cached = sum(out for out, member in zip(site.outs, site.members, strict=True) if member in keys_values)
        if rank is not None:
            saved += max(0, cached - rank)
    return saved


def _macs_per_token(model: nn.Module) -> int:
    linears = (m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))
    mixed = (m for m in model.modules() if isinstance(m, MixedLinear))
    return sum(linear.weight.numel() for linear in linears) + sum(m.int8.numel() + m.float16.numel() for m in mixed)
