"""From a GGUF file to a plain checkpoint folder: safetensors, config.json, tokenizer.

This imports gguf, which is an optional package, and is imported where there is a GGUF file.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from gguf import GGUFReader, GGUFValueType
from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import gguf, gguf_tokenizer
from lowrank_lab.models.gguf_vocabulary import entry
from lowrank_lab.process import progress

log = logging.getLogger(__name__)
STATED = {  # attributes of configurations, by the name that follows the architecture's in a file
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "moe_intermediate_size": "expert_feed_forward_length",
}
ROTARY = "rope_freqs.weight"  # the only tensor that is no weight of the model


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantized to float32, and its tokenizer into ``folder``.

    Raises UserError as ``read`` does.
    """
    model, tokenizer = read(file)
    log.info("keeping them as safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(file: Path) -> tuple[Any, Any]:
    """The model of a GGUF file, dequantized to float32, and its tokenizer.

    Raises UserError where weights are missing, left over or of wrong shapes, or where the tokenizer is not the
    file's.
    """
    header = gguf.read_header(file)
    log.info("reading %s: its tokenizer", file.name)
    tokenizer = _tokenizer(file, header)
    log.info("reading %s: its configuration", file.name)
    config = load_config(file)
    log.info("reading %s: %d tensors", file.name, len(header.tensors))
    model = _model(file, header, config)
    for name in ("bos", "eos", "pad"):
        setattr(model.generation_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    return model, tokenizer


def load_config(file: Path) -> Any:
    """The transformers configuration of the model in a GGUF file. Raises UserError where it makes none."""
    header = gguf.read_header(file)
    [rows] = (tensor.shape[0] for tensor in header.tensors if tensor.name == "token_embd.weight")
    special = {"bos": "bos", "eos": "eos", "pad": "padding"}
    ids = {f"{ours}_token_id": entry(header.metadata, f"{theirs}_token_id") for ours, theirs in special.items()}
    try:
        with _own_reading():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        config.update({**ids, "vocab_size": rows})
        _complete(config, header)
        _scale_rotary(file, header, config)
        _skeleton(config)
    except UserError:
        raise
    except Exception as error:  # wrong types, values that contradict each other: configurations raise many kinds
        why = _in_one_line(error)
        raise UserError(f"model.path={file}: its metadata make no {header.architecture} model ({why})") from None
    return config


def _complete(config: Any, header: gguf.Header) -> None:
    """Set what the file tells and transformers' reader leaves at the defaults of another model."""
    for name, key in STATED.items():
        if hasattr(config, name) and (value := header.of_architecture(key)) is not None:
            setattr(config, name, value or None)  # a window of 0 positions means none
    size = config.hidden_size // config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    if hasattr(config, "query_pre_attn_scalar"):
        # No file says it: the size of a head, but for Gemma 2 and 3 27B. So in llama.cpp, by their layers.
        whole = (header.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
        config.query_pre_attn_scalar = size if whole else config.head_dim
    rotary = getattr(config, "rope_parameters", None) or {}
    bases = {"full_attention": "rope.freq_base", "sliding_attention": "rope.freq_base_swa"}
    for kind, key in bases.items():
        of_kind = rotary.get(kind, rotary if kind == "full_attention" else {})
        if of_kind and (base := header.of_architecture(key)) is not None:
            of_kind["rope_theta"] = base
    turned = header.of_architecture("rope.dimension_count")
    if "partial_rotary_factor" in rotary and turned is not None:
        size = getattr(config, "head_dim", None) or size
        rotary["partial_rotary_factor"] = config.partial_rotary_factor = turned / size


def _scale_rotary(file: Path, header: gguf.Header, config: Any) -> None:
    """Set LLaMA 3's scaling of rotary frequencies, of which a file has nothing but what they are divided by.

    All models that have it differ in the factor alone (the scaling starts at 8192 positions).
    """
    if (divisors := gguf.read_float32(file, header, ROTARY)) is None or not (divisors != 1).any():
        return
    factor = float(divisors.max())
    rotary = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {**config.rope_parameters, **rotary, "original_max_position_embeddings": 8192}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    frequencies = config.rope_parameters["rope_theta"] ** -(np.arange(len(divisors)) / len(divisors))
    if not np.allclose(frequencies / divisors, scaled.numpy(), rtol=1e-3, atol=0):
        raise UserError(
            f"model.path={file}: its rotary frequencies are scaled in an unknown way ({ROTARY}); give the model's "
            "folder or hub name"
        )


def _tokenizer(file: Path, header: gguf.Header) -> Any:
    beside = gguf.tokenizer_beside(file)
    try:
        tokenizer = gguf_tokenizer.build(header.metadata, beside)
    except Exception as error:  # tokenizers raises nothing more special
        which = "its tokenizer" if beside is None else "the tokenizer.json beside it"
        raise UserError(f"model.path={file}: {which} is broken ({_in_one_line(error)})") from None
    if fault := gguf_tokenizer.fault(tokenizer, header.metadata):
        raise UserError(f"model.path={file}: {fault}")
    return tokenizer


def _model(file: Path, header: gguf.Header, config: Any) -> Any:
    """The model, with all weights of the file and no others."""
    shapes = {name: tuple(parameter.shape) for name, parameter in _skeleton(config).named_parameters()}
    try:
        with _own_reading():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,  # a GGUF needs none, whatever else is in its folder
            )
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise UserError(f"model.path={file}: its weights cannot be read ({_in_one_line(error)})") from None
    missing = sorted(report["missing_keys"])
    uneven = [name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]]
    uneven += [str(mismatch[0]) for mismatch in report["mismatched_keys"]]
    for what, names in (("are missing in the file", missing), ("have shapes that its metadata contradict", uneven)):
        if names:
            raise UserError(f"model.path={file}: {len(names)} weights {what}, such as {names[0]}")
    read = sum(parameter.numel() for parameter in model.parameters())
    there = sum(tensor.values for tensor in header.tensors if tensor.name != ROTARY)
    if read != there:
        raise UserError(
            f"model.path={file}: {there} weights are in the file, but the {header.architecture} of transformers "
            f"has {read}; give the model's folder or hub name"
        )
    # The weights are dequantized now, but the model still calls itself quantized and would refuse to save.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _skeleton(config: Any) -> Any:
    """The model without weights, for their shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class _WithoutVocabulary(GGUFReader):
    """Steps over long lists: a vocabulary takes this reader up to half a minute, and is not needed of it."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack("<IQ", self.data[orig_offs : orig_offs + 12].tobytes())
        if count < 1000:
            return super()._get_field_parts(orig_offs, raw_type)
        return gguf.array_size(self.data, orig_offs), [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]


@contextmanager
def _own_reading() -> Iterator[None]:
    """Show the reading of tensors as all other work, and our own errors: no bar or table of transformers."""

    def track(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        return progress.track(tensors, "conversion", "tensor")

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with (
            patch.object(modeling_gguf_pytorch_utils, "tqdm", track, create=True),
            patch("gguf.GGUFReader", _WithoutVocabulary),
        ):
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
