"""Tiny GGUF files, with a SentencePiece vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LAYERS, HIDDEN, INNER = 2, 32, 64


def vocabulary(words: Iterable[str], defined: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer: ``words`` are merged from their characters, the first ones first.

    ``defined`` are tokens of the user.
    """
    parts = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    letters = sorted({letter for word in words for letter in word})
    groups = (
        (["<unk>"], UNKNOWN),
        (["<s>", "</s>"], CONTROL),
        ([f"<0x{byte:02X}>" for byte in range(256)], BYTE),
        (list(defined), USER_DEFINED),
        (list(parts), NORMAL),
        (letters, NORMAL),
    )
    tokens = [token for group, _ in groups for token in group]
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [kind for group, kind in groups for _ in group],
        "scores": [-float(number) for number in range(len(tokens))],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def tensors(rows: int) -> dict[str, np.ndarray]:
    """Random weights of a LLaMA of LAYERS blocks with tied embeddings of ``rows``."""
    shapes = {"token_embd.weight": (rows, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for block in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{name}.weight"] = (HIDDEN, HIDDEN)
        for name, shape in (
            ("ffn_gate", (INNER, HIDDEN)),
            ("ffn_up", (INNER, HIDDEN)),
            ("ffn_down", (HIDDEN, INNER)),
        ):
            shapes[f"blk.{block}.{name}.weight"] = shape
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{block}.{name}.weight"] = (HIDDEN,)
    random = np.random.default_rng(0)
    return {name: 0.1 * random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(
    file: Path,
    metadata: dict[str, Any],
    weights: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file with ``metadata`` and ``weights`` (by default those of ``tensors``)."""
    writer = gguf.GGUFWriter(file, architecture, endianess=endianess)
    writer.add_name("tiny")
    for name, value in {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "rope.dimension_count": HIDDEN // 2,
    }.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, value in metadata.items():
        _add(writer, name, value)
    if weights is None:
        weights = tensors(len(metadata["tokenizer.ggml.tokens"]))
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
