"""From a ModelSource to a transformers model and tokenizer."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowrank_lab.errors import UserError
from lowrank_lab.models import tiny
from lowrank_lab.models.source import ModelSource

# Our own progress shows the loading; these bars would only fill log files.
transformers.utils.logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(source: ModelSource, folder: Path) -> None:
    """Write a GGUF or tiny model as a plain checkpoint folder: safetensors, config.json, tokenizer."""
    if source.kind == "tiny":
        tiny.build(source.location, folder)
        return
    file = Path(source.location)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    where["trust_remote_code"] = False  # a GGUF needs none, whatever else is in its folder
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are dequantized now, but the model still calls itself quantized and would refuse to save.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def load_config(location: str, revision: str | None, trust_remote_code: bool, **where: Any) -> Any:
    """The transformers configuration of a model; ``where`` holds more arguments for transformers.

    Raises UserError for one that needs its own code.
    """
    with _refuse_remote_code(location):
        return AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code, **where)


def skeleton(model_config: Any, trust_remote_code: bool) -> Any:
    """The model of ``load_config`` without weights, for shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)


def load_model(location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A causal language model in evaluation mode, on the CPU, in ``dtype``, its key-value cache off.

    Raises UserError for one whose weights or files would run code that the user has not allowed.
    """
    with _refuse_remote_code(location):
        # transformers reads .bin files, which are pickles, with torch's weights_only.
        model = AutoModelForCausalLM.from_pretrained(
            location, revision=revision, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code
        )
    model.config.use_cache = False
    return model.eval()


def load_tokenizer(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a model. Raises UserError for one that needs its own code."""
    with _refuse_remote_code(location):
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)


@contextmanager
def _refuse_remote_code(location: str) -> Iterator[None]:
    """Raises UserError where transformers or torch refuse to run code that comes with a model."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(
            f"model.path={location}: its .bin weights hold more than tensors and are not read, since reading them "
            "would run code; convert them to safetensors where you trust them"
        ) from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model.path={location}: the model needs Python code that comes with it, which is not run unless you "
            "say model.trust_remote_code=true; read it first"
        ) from None
