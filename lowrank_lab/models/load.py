"""From a ModelSource to a transformers model and tokenizer."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowrank_lab.artifacts.store import disk_full
from lowrank_lab.errors import UserError
from lowrank_lab.models import quantized_by_others, tiny
from lowrank_lab.models.folder_check import MERGE
from lowrank_lab.models.source import ModelSource
from lowrank_lab.models.weight_files import RUNS_CODE
from lowrank_lab.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

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

    Raises UserError for one that needs its own code, and for one that transformers cannot read.
    """
    with _one_line(location):
        found = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code, **where
        )
    entry = quantized_by_others.entry_in(found.to_dict())
    if entry is not None and "gguf_file" not in where:  # folder_check.py lets models pass whose weights are floats
        log.info(
            "%s: what its config.json says of a quantization (%s) is ignored: its weights are floats",
            location,
            entry,
        )
        for name in quantized_by_others.ENTRIES:
            if hasattr(found, name):
                delattr(found, name)
    return found


def skeleton(model_config: Any, trust_remote_code: bool) -> Any:
    """The model of ``load_config`` without weights, for shapes. Raises UserError for sizes that make no model."""
    with _one_line(model_config.name_or_path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)


def load_model(location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A causal language model in evaluation mode, on the CPU, in ``dtype``, its key-value cache off.

    Raises UserError for one whose weights or files would run code that the user has not allowed, and for weights
    that are not those of the model.
    """
    model = _loaded(location, revision, trust_remote_code, dtype=DTYPES[dtype])
    model.config.use_cache = False
    return model.eval()


def check_model(location: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises UserError as ``load_model`` and ``load_tokenizer`` do; no values of weights are read."""
    _loaded(location, revision, trust_remote_code, device_map="meta")
    load_tokenizer(location, revision, trust_remote_code)


def load_tokenizer(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a model. Raises UserError for one that needs its own code, or that cannot be read."""
    with _one_line(location):
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)


def _loaded(location: str, revision: str | None, trust_remote_code: bool, **how: Any) -> Any:
    """The model of ``location``, whose weights are all its own: transformers draws at random what a file lacks."""
    model_config = load_config(location, revision, trust_remote_code)
    with _one_line(location):
        # transformers reads .bin files, which are pickles, with torch's weights_only.
        model, found = AutoModelForCausalLM.from_pretrained(
            location,
            config=model_config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # else it stops at the first with a message of many lines
            output_loading_info=True,
            **how,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model.path={location}: there is an adapter with the model, which is not meant here: {MERGE}"
        )
    if wrong := differences(found):
        raise UserError(
            f"model.path={location}: its weights are not those of a {type(model).__name__} as its config.json "
            f"describes it: {wrong}"
        )
    return model


OLD_BUFFERS = re.compile(r"(^|\.)((self_)?att(n|ention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
SHOWN = 3  # names of each kind in a message


def differences(found: Mapping[str, Any]) -> str:
    """What transformers' ``output_loading_info`` says of weights that a model lacks, or that do not belong to it.

    It knows what a family leaves out: tied weights, and buffers that are computed. Some buffers that old versions
    saved, it no longer knows. Empty where all is well.
    """
    unexpected = [name for name in found["unexpected_keys"] if not OLD_BUFFERS.search(name)]
    sizes = [f"{name} {tuple(has)} instead of {tuple(needs)}" for name, has, needs in found["mismatched_keys"]]
    kinds = {"missing": found["missing_keys"], "of other sizes": sizes, "unknown": unexpected}
    return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


def _first(names: Collection[str]) -> str:
    return ", ".join([*sorted(names)[:SHOWN], *(["…"] if len(names) > SHOWN else [])])


@contextmanager
def _one_line(location: str) -> Iterator[None]:
    """Raises UserError where transformers or torch cannot read a model, or refuse to run code that comes with it."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(f"model.path={location}: {RUNS_CODE}") from None
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error) or disk_full(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path={location}: the model needs Python code that comes with it, which is not run unless you "
                "say model.trust_remote_code=true; read it first"
            ) from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"model.path={location}: transformers {transformers.__version__} cannot read it ({type(error).__name__}: "
            f"{' '.join(lines)[:LONGEST]})"
        ) from error


LONGEST = 300  # characters of another library's message
