"""Tiny random models of all families with a row and of others, with a byte tokenizer: for tests and first trials.

This module imports torch only when a model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VERSION = 1  # raise when the models that build() makes change
SEED = 0

_SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention: k and v are half as wide as q
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOKENS: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WINDOWS = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}

CONFIGS: dict[str, dict[str, Any]] = {  # of the rows of families.py
    "llama": {**_SIZES, "tie_word_embeddings": True},
    "mistral": {**_SIZES, "head_dim": 12, "sliding_window": 16},
    "qwen2": {**_SIZES},
    "qwen3": {**_SIZES, "head_dim": 16},
    "gemma2": {**_SIZES, **_WINDOWS, "num_hidden_layers": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SIZES, **_WINDOWS, "num_hidden_layers": 4, "query_pre_attn_scalar": 16},
    "opt": {
        "vocab_size": 260,
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt2": {
        "vocab_size": 260,
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "phi3": {**_SIZES},
}

DISCOVERED_CONFIGS: dict[str, dict[str, Any]] = {  # of families without a row, whose blocks are discovered
    "bloom": {**_TOKENS, "hidden_size": 48, "n_layer": 3, "n_head": 4},
    "cohere": {**_SIZES},
    "falcon": {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt_neo": {  # each attention has a buffer that checkpoints do not have
        **_TOKENS,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {
        **_TOKENS,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "granite": {**_SIZES},
    "mamba": {**_TOKENS, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8},
    "mixtral": {**_SIZES, "num_local_experts": 4},
    "mpt": {**_TOKENS, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 2048},
    "olmo2": {**_SIZES},
    "qwen2_moe": {
        **_SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "smollm3": {**_SIZES},
    "stablelm": {**_SIZES, "partial_rotary_factor": 0.5},
    "starcoder2": {**_SIZES},
}

ALL_CONFIGS = {**CONFIGS, **DISCOVERED_CONFIGS}


def build(family: str, folder: Path) -> None:
    """Save a random model of ``family`` (a key of ALL_CONFIGS) and its tokenizer as a checkpoint folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **ALL_CONFIGS[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes plus <pad>, <s>, </s> and <unk>: ids 0 to 259."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
