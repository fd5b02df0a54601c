"""Architectures as data: which modules are the blocks, and which linears inside one may be compressed.

A new architecture is a new row of ``FAMILIES``. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lowrank_lab.errors import UserError


@dataclass(frozen=True)
class Tower:
    """One decoder family.

    ``blocks`` is the path of the list of transformer blocks. ``inputs`` lists the compressible linears of a
    block, grouped by the input they share: linears of one group see the same activations, so they share one input
    statistic. Embeddings and lm_head are never listed: they are left alone, tied or not. ``roles`` names sets of
    these linears that methods speak of; a fused linear is its own role.

    The rest is what rotations and scales of activations need. ``norm`` is the kind of all norms (``rms_plus_one``
    multiplies by 1 + weight); ``norms`` has for each group of ``inputs`` the one that feeds it, within the block
    (None: another linear does); ``final_norm`` is the path of the last. ``residual`` lists the linears whose output
    is added to the residual stream as it is; ``feeds`` has, by linear, the one whose output rows scale its input.
    """

    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    roles: Mapping[str, tuple[str, ...]] = field(hash=False)
    norm: Literal["rms", "rms_plus_one", "layer"]
    norms: tuple[str | None, ...]
    final_norm: str
    residual: tuple[str, ...]
    feeds: Mapping[str, str] = field(hash=False)

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.inputs for name in group)


LLAMA = Tower(
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
    norm="rms",
    norms=("input_layernorm", None, "post_attention_layernorm", None),
    final_norm="model.norm",
    residual=("self_attn.o_proj", "mlp.down_proj"),
    feeds={"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"},
)

# Norms stand also after attention and MLP, before their outputs are added to the residual stream.
GEMMA = replace(
    LLAMA,
    norm="rms_plus_one",
    norms=("input_layernorm", None, "pre_feedforward_layernorm", None),
    residual=(),
)

OPT = Tower(
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
    norm="layer",
    norms=("self_attn_layer_norm", None, "final_layer_norm", None),
    final_norm="model.decoder.final_layer_norm",
    residual=("self_attn.out_proj", "fc2"),
    feeds={"self_attn.out_proj": "self_attn.v_proj"},
)

# transformers stores these weights as Conv1D, shape (in, out); q, k and v are one fused matrix.
GPT2 = Tower(
    blocks="transformer.h",
    inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    roles={
        "qkv": ("attn.c_attn",),
        "attention": ("attn.c_attn", "attn.c_proj"),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
    },
    norm="layer",
    norms=("ln_1", None, "ln_2", None),
    final_norm="transformer.ln_f",
    residual=("attn.c_proj", "mlp.c_proj"),
    feeds={},
)

# q|k|v and gate|up are each one fused linear, compressed as one matrix.
PHI3 = Tower(
    blocks="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    roles={
        "qkv": ("self_attn.qkv_proj",),
        "attention": ("self_attn.qkv_proj", "self_attn.o_proj"),
        "gate_up": ("mlp.gate_up_proj",),
        "mlp": ("mlp.gate_up_proj", "mlp.down_proj"),
    },
    norm="rms",
    norms=("input_layernorm", None, "post_attention_layernorm", None),
    final_norm="model.norm",
    residual=("self_attn.o_proj", "mlp.down_proj"),
    feeds={},
)

FAMILIES: dict[str, Tower] = {  # by config.json's model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "opt": OPT,
    "gpt2": GPT2,
    "phi3": PHI3,
}


def tower_for(model_type: str) -> Tower:
    """The row of an architecture. Raises UserError for one without compressible layers known here."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model type '{model_type}' has no compressible layer known to lowrank_lab; known types: "
            f"{', '.join(sorted(FAMILIES))} (to add one, see CONTRIBUTING.md)"
        )
    return FAMILIES[model_type]


def kv_cache_values_per_token(config: Any) -> int:
    """Numbers cached a token over all layers: 2 · layers · key-value heads · head size.

    Under grouped-query attention the key-value heads are fewer than the query heads, and the head size need
    not be hidden_size / heads (Gemma, Qwen3). ``config`` is a transformers PretrainedConfig.
    """
    layers, kv_heads, head_size = kv_cache_shape(config)
    return 2 * layers * kv_heads * head_size


def kv_cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_size
