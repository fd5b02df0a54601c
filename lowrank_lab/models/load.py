"""From a ModelSource to a transformers model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_lab.models import tiny
from lowrank_lab.models.source import ModelSource

# Loading takes its place in our own progress; these bars would only break up log files.
transformers.utils.logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(source: ModelSource, folder: Path) -> None:
    """Write a GGUF or tiny model as a plain checkpoint folder: safetensors, config.json, tokenizer."""
    if source.kind == "tiny":
        tiny.build(source.location, folder)
        return
    file = Path(source.location)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are dequantized now, but the model still calls itself quantized and would refuse to save.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def load_model(location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A causal language model in evaluation mode, on the CPU, in ``dtype``, its key-value cache off."""
    model = AutoModelForCausalLM.from_pretrained(
        location, revision=revision, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
    )
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
