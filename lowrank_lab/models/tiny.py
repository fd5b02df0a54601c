"""Tiny random models of all families with a row and of others, with a byte tokenizer: for tests and first trials.

This module imports torch only when a model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_lab.models.vision_families import AUTO, task_of

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

_IMAGES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
_OF_TEXT: dict[str, Any] = {**_TOKENS, **{name: _IMAGES[name] for name in _IMAGES if "size" not in name}}
_OF_TEXT |= {"hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 32}

VISION_CONFIGS: dict[str, dict[str, Any]] = {  # of the rows of vision_families.py
    "vit": {**_IMAGES, "num_labels": 10},
    "deit": {**_IMAGES, "num_labels": 10, "architectures": ["DeiTForImageClassificationWithTeacher"]},
    "dinov2": {
        "hidden_size": 48,
        "mlp_ratio": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "num_labels": 10,
    },
    "clip": {"vision_config": _IMAGES, "text_config": _OF_TEXT, "projection_dim": 16, "num_labels": 10},
    "siglip": {"vision_config": _IMAGES, "text_config": _OF_TEXT, "num_labels": 10},
}

_INNER = {**_SIZES, "vocab_size": 261, "model_type": "llama"}  # one more token: <image>
_SEEN = {"text_config": _INNER, "vision_config": {**_IMAGES, "model_type": "clip_vision_model"}}
_TILED = {"text_config": {**_INNER, "vocab_size": 263}, "vision_config": _IMAGES, "scale_factor": 2}
IMAGE_TOKEN = 260
PINPOINTS = [[28, 56], [56, 28], [56, 56]]  # heights and widths of images that LLaVA-Next cuts into tiles

IMAGE_TEXT_CONFIGS: dict[str, dict[str, Any]] = {  # of models of images and text, whose rows are there too
    "llava": {**_SEEN, "image_token_index": IMAGE_TOKEN},
    "llava_next": {**_SEEN, "image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": PINPOINTS},
    "idefics3": {**_TILED, "image_token_id": IMAGE_TOKEN},
    "smolvlm": {**_TILED, "image_token_id": IMAGE_TOKEN},
}

ALL_CONFIGS = {**CONFIGS, **DISCOVERED_CONFIGS}  # of language models
KINDS = (CONFIGS, DISCOVERED_CONFIGS, VISION_CONFIGS, IMAGE_TEXT_CONFIGS)
EVERY_CONFIG = {**ALL_CONFIGS, **VISION_CONFIGS, **IMAGE_TEXT_CONFIGS}


CHAT = (  # LLaVA-1.5's form of a conversation
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build(family: str, folder: Path) -> None:
    """Save a random model of ``family`` (a key of EVERY_CONFIG) and what makes its inputs as a folder."""
    import torch
    import transformers

    auto = getattr(transformers, AUTO[task_of(family)])
    config = transformers.AutoConfig.for_model(family, **EVERY_CONFIG[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)


def processor(family: str) -> Any:
    """What makes the inputs of the models of ``family``."""
    if family in IMAGE_TEXT_CONFIGS:
        return image_text_processor(family)
    return image_processor() if family in VISION_CONFIGS else byte_tokenizer()


def image_processor() -> Any:
    """The processor of a ViT for square images: resized, from 0 … 255 to -1 … 1."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = _IMAGES["image_size"]
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def image_text_processor(family: str) -> Any:
    """The byte tokenizer with a token <image>, and the image processor of the family, with Pillow."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = _IMAGES["image_size"]
    if "scale_factor" in IMAGE_TEXT_CONFIGS[family]:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
        from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

        tiles = Idefics3ImageProcessorPil(size={"longest_edge": 2 * size}, max_image_size={"longest_edge": size})
        return Idefics3Processor(tiles, tokenizer, image_seq_len=4, chat_template=CHAT)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    how = {
        "patch_size": _IMAGES["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT,
    }
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    if family == "llava_next":
        tiles = LlavaNextImageProcessorPil(**shape, image_grid_pinpoints=PINPOINTS)
        return LlavaNextProcessor(tiles, tokenizer, **how)
    return LlavaProcessor(CLIPImageProcessorPil(**shape), tokenizer, **how)


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
