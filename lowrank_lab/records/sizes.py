"""What a compressed model weighs, counted on its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.lowrank.ranks import Site, Sites, total_cost
from lowrank_lab.models.families import Tower, kv_cache_shape, kv_cache_values_per_token
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.attention import cache_of
from lowrank_lab.modules.mixed import MixedLinear
from lowrank_lab.modules.quantized import QuantizedLinear
from lowrank_lab.modules.steps import Step


def sizes(
    model: nn.Module, tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None], ratio: float
) -> dict[str, Any]:
    """What was asked for and what came out.

    ratio_reached            of what the ratio counts (parameters, 16-bit words, cached values)
    parameters, bytes        of the whole model, tied tensors once; scales and zero points count to the bytes alone
    sites                    of what is compressed, biases apart: ``parameters`` now and dense, whatever their
                             bits; ``bytes`` with scales and all that is done to activations
    macs_per_token           multiply-accumulates of all linear layers with lm_head, attention products apart
    kv_cache_bytes_per_token keys and values of all layers in the model's dtype, or in few bits with their scales;
                             None for a model that caches something else
    kv_latent_bytes_per_token  in the model's dtype, if the latent of each key and value projection were cached
                             instead of its output, where it is narrower (ASVD §3.4; a latent that both share counts
                             once); None where they are fused with the queries
    hardware_cost            QSVD's R1, the fraction kept of the parameters (and so of the multiply-accumulates) of
                             the query, key and value projections, and R2, of the cached values if latents were:
                             with one latent for all three r (E + q + k + v) / E (q + k + v) and r / (k + v)
    """
    value_bytes = model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    members = [linear for site in sites.values() for linear in _members(model, tower, site)]
    online = [step for step in model.modules() if isinstance(step, Step)]
    of_sites = {id(p): p for linear in members for n, p in linear.named_parameters() if not n.endswith("bias")}
    of_sites |= {id(p): p for step in online for p in step.parameters()}
    parameters = sum(site.parameters(ranks[name]) for name, site in sites.items())
    counted = sum(macs_per_token(linear) for linear in members)
    assert counted == parameters, "the tensors do not have the planned ranks"
    dense = sum(site.dense for site in sites.values())
    cached, shape, cache = kv_cache_values_per_token(model.config), kv_cache_shape(model.config), cache_of(model)
    latent = None
    if cached is not None and (tower is None or "kv" in tower.roles):
        latent = cached - _latent_saves(tower, sites, ranks)
    if shape is not None and cache is not None:
        cache_bytes: int | None = cache.bytes_per_token(*shape)
    else:
        cache_bytes = None if cached is None else cached * value_bytes
    return {
        "ratio_asked": ratio,
        "ratio_reached": total_cost(sites, ranks) / dense if sites else 1.0,
        "parameters": _parameters(model),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "sites": {
            "count": len(sites),
            "parameters_dense": sum(site.parameters(None) for site in sites.values()),
            "parameters": parameters,
            "bytes": sum(p.numel() * p.element_size() for p in of_sites.values()),
        },
        "macs_per_token": macs_per_token(model),
        "kv_cache_bytes_per_token": cache_bytes,
        "kv_latent_bytes_per_token": None if latent is None else latent * value_bytes,
        "hardware_cost": {
            "r1": _kept_of_qkv(model, tower, sites, ranks),
            "r2": None if latent is None or cached is None else latent / cached,
        },
    }


def linear_tensors(model: nn.Module) -> list[Tensor]:
    """What a token is multiplied with: the weights of all linear layers with lm_head, biases and scales apart."""
    return [tensor for module in model.modules() for tensor in _linear(module)[0]]


def macs_per_token(model: nn.Module) -> int:
    """How many weights all linear layers with lm_head have, whatever bits they are kept in."""
    return sum(_linear(module)[1] for module in model.modules())


def _linear(module: nn.Module) -> tuple[list[Tensor], int]:
    """The tensors that hold the weights of a linear layer, and how many weights it has; of other modules none."""
    if isinstance(module, QuantizedLinear):
        return [module.get_parameter("codes")], module.out_features * module.in_features
    tensors: list[Tensor] = []
    if isinstance(module, (nn.Linear, Conv1D)):
        tensors = [module.weight]
    elif isinstance(module, MixedLinear):
        tensors = [module.int8, module.float16]
    return tensors, sum(tensor.numel() for tensor in tensors)


def _parameters(model: nn.Module) -> int:
    """Those of the whole model, tied ones once; scales and the like of few bits are bytes, but no parameters."""
    kinds = (QuantizedLinear, MixedLinear, Step)
    in_few_bits = [module for module in model.modules() if isinstance(module, kinds)]
    kept = {id(p) for module in in_few_bits for name, p in module.named_parameters() if name != "bias"}
    others = sum(p.numel() for p in model.parameters() if id(p) not in kept)
    return others + sum(_linear(module)[1] for module in in_few_bits)


def _members(model: nn.Module, tower: Tower | None, site: Site) -> list[nn.Module]:
    """The linears of a site, dense or factorized."""
    assert tower is not None
    block = blocks_of(model, tower)[site.block]
    return [block.get_submodule(member) for member in site.members]


def _kept_of_qkv(
    model: nn.Module, tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None]
) -> float | None:
    """The fraction kept of the parameters of all query, key and value projections, compressed or not.

    None for a model without them.
    """
    if tower is None:
        return 1.0
    if "qkv" not in tower.roles:
        return None
    of_qkv = {name: site for name, site in sites.items() if set(site.members) <= set(tower.roles["qkv"])}
    saved = sum(site.parameters(None) - site.parameters(ranks[name]) for name, site in of_qkv.items())
    projections = [block.get_submodule(name) for block in blocks_of(model, tower) for name in tower.roles["qkv"]]
    kept = sum(macs_per_token(projection) for projection in projections)
    return kept / (kept + saved)


def _latent_saves(tower: Tower | None, sites: Sites, ranks: Mapping[str, int | None]) -> int:
    """How many values a token fewer the latents of the key and value projections are than their outputs."""
    saved = 0
    for name, site in sites.items():
        rank = ranks[name]
        assert tower is not None
        keys_values = tower.roles["kv"]
        cached = sum(out for out, member in zip(site.outs, site.members, strict=True) if member in keys_values)
        if rank is not None:
            saved += max(0, cached - rank)
    return saved
