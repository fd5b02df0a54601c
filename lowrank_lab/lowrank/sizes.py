"""What a compressed model weighs, counted on its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.lowrank.mixed import MixedLinear
from lowrank_lab.lowrank.quantized import QuantizedLinear
from lowrank_lab.lowrank.ranks import Site, Sites, total_cost
from lowrank_lab.models.arch import ArchSpec, kv_cache_values_per_token
from lowrank_lab.models.walk import blocks_of

# Tensors of quantized layers that are no weights as such.
OF_QUANTIZED = ("codes", "scale", "zero", "codebook")


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
    hardware_cost            QSVD's R1, the fraction kept of the parameters (and so of the multiply-accumulates) of
                             the query, key and value projections, and R2, kv_latent over kv_cache bytes: with one
                             latent for all three r (E + q + k + v) / E (q + k + v) and r / (k + v)
    """
    tensors = list(model.parameters())
    packed = {id(p) for name, p in model.named_parameters() if name.split(".")[-1] in OF_QUANTIZED}
    value_bytes = model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    of_sites = [tensor for site in sites.values() for tensor in _weights(model, spec, site)]
    parameters = sum(site.parameters(ranks[name]) for name, site in sites.items())
    assert _counted(model, spec, sites) == parameters, "the tensors do not have the planned ranks"
    dense = sum(site.dense for site in sites.values())
    cached = kv_cache_values_per_token(model.config)
    latent = None if spec is not None and "kv" not in spec.roles else cached - _latent_saves(spec, sites, ranks)
    return {
        "ratio_asked": ratio,
        "ratio_reached": total_cost(sites, ranks) / dense if sites else 1.0,
        "parameters": _in_few_bits(model) + sum(p.numel() for p in tensors if id(p) not in packed),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "sites": {
            "count": len(sites),
            "parameters_dense": sum(site.parameters(None) for site in sites.values()),
            "parameters": parameters,
            "bytes": sum(tensor.numel() * tensor.element_size() for _, tensor in of_sites),
        },
        "macs_per_token": macs_per_token(model),
        "kv_cache_bytes_per_token": cached * value_bytes,
        "kv_latent_bytes_per_token": None if latent is None else latent * value_bytes,
        "hardware_cost": {
            "r1": _kept_of_qkv(model, spec, sites, ranks),
            "r2": None if latent is None else latent / cached,
        },
    }


def _counted(model: nn.Module, spec: ArchSpec | None, sites: Sites) -> int:
    """How many weights the linears of all sites have, whatever bits they are kept in."""
    kept = [item for site in sites.values() for item in _weights(model, spec, site)]
    return _in_few_bits(model) + sum(tensor.numel() for name, tensor in kept if name not in OF_QUANTIZED)


def _in_few_bits(model: nn.Module) -> int:
    """How many weights are kept as packed codes."""
    quantized = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return sum(module.out_features * module.in_features for module in quantized)


def linear_tensors(model: nn.Module) -> list[Tensor]:
    """What a token is multiplied with: the weights of all linear layers with lm_head, biases and scales apart."""
    linears = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    linears += [t for m in model.modules() if isinstance(m, MixedLinear) for t in (m.int8, m.float16)]
    return linears + [t for n, t in model.named_parameters() if n.split(".")[-1] == "codes"]


def macs_per_token(model: nn.Module) -> int:
    packed = sum(t.numel() for n, t in model.named_parameters() if n.split(".")[-1] == "codes")
    return sum(tensor.numel() for tensor in linear_tensors(model)) - packed + _in_few_bits(model)


def _weights(model: nn.Module, spec: ArchSpec | None, site: Site) -> list[tuple[str, nn.Parameter]]:
    """The tensors of a site without its biases, by the last part of their names."""
    assert spec is not None
    block = blocks_of(model, spec)[site.block]
    named = [item for member in site.members for item in block.get_submodule(member).named_parameters()]
    return [(name.split(".")[-1], tensor) for name, tensor in named if not name.endswith("bias")]


def _kept_of_qkv(model: nn.Module, spec: ArchSpec | None, sites: Sites, ranks: Mapping[str, int | None]) -> float:
    """The fraction kept of the parameters of all query, key and value projections, compressed or not."""
    if spec is None:
        return 1.0
    of_qkv = {name: site for name, site in sites.items() if set(site.members) <= set(spec.roles["qkv"])}
    saved = sum(site.parameters(None) - site.parameters(ranks[name]) for name, site in of_qkv.items())
    projections = [block.get_submodule(name) for block in blocks_of(model, spec) for name in spec.roles["qkv"]]
    kept = sum(macs_per_token(projection) for projection in projections)
    return kept / (kept + saved)


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
