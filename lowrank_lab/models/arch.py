"""Architectures as data: which modules are the blocks, and which linears inside one may be compressed.

A new architecture is a new row of ``ARCHITECTURES``. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_lab.errors import UserError


@dataclass(frozen=True)
class ArchSpec:
    """One decoder family.

    ``blocks`` is the path of the list of transformer blocks. ``inputs`` lists the compressible linears of a
    block, grouped by the input they share: linears of one group see the same activations, so they share one input
    statistic. Embeddings and lm_head are never listed: they are left alone, tied or not. ``roles`` names sets of
    these linears that methods speak of; a fused linear is its own role.
    """

    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    roles: Mapping[str, tuple[str, ...]] = field(hash=False)

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.inputs for name in group)


LLAMA = ArchSpec(
    blocks="model.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    roles={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "kv": ("self_attn.k_proj", "self_attn.v_proj"),
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
)

OPT = ArchSpec(
    blocks="model.decoder.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    roles={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "kv": ("self_attn.k_proj", "self_attn.v_proj"),
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        "mlp": ("fc1", "fc2"),
    },
)

# transformers stores these weights as Conv1D, shape (in, out); q, k and v are one fused matrix.
GPT2 = ArchSpec(
    blocks="transformer.h",
    inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    roles={
        "qkv": ("attn.c_attn",),
        "attention": ("attn.c_attn", "attn.c_proj"),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
    },
)

# q|k|v and gate|up are each one fused linear, compressed as one matrix.
PHI3 = ArchSpec(
    blocks="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    roles={
        "qkv": ("self_attn.qkv_proj",),
        "attention": ("self_attn.qkv_proj", "self_attn.o_proj"),
        "gate_up": ("mlp.gate_up_proj",),
        "mlp": ("mlp.gate_up_proj", "mlp.down_proj"),
    },
)

ARCHITECTURES: dict[str, ArchSpec] = {  # by config.json's model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "opt": OPT,
    "gpt2": GPT2,
    "phi3": PHI3,
}


def spec_for(model_type: str) -> ArchSpec:
    """The row of an architecture. Raises UserError for one without compressible layers known here."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"model type '{model_type}' has no compressible layer known to lowrank_lab; known types: "
            f"{', '.join(sorted(ARCHITECTURES))} (to add one, see CONTRIBUTING.md)"
        )
    return ARCHITECTURES[model_type]


def kv_cache_values_per_token(config: Any) -> int:
    """Numbers cached a token over all layers: 2 · layers · key-value heads · head size.

    Under grouped-query attention the key-value heads are fewer than the query heads, and the head size need
    not be hidden_size / heads (Gemma, Qwen3). ``config`` is a transformers PretrainedConfig.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_size
