"""From a ModelSource to a transformers model and tokenizer."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowrank_lab.artifacts.store import disk_full
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import generation_settings, quantized_by_others, tiny
from lowrank_lab.models.differences import differences
from lowrank_lab.models.folder_check import MERGE
from lowrank_lab.models.source import ModelSource
from lowrank_lab.models.weight_files import RUNS_CODE
from lowrank_lab.process.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

# Our own progress shows the loading; these bars would only fill log files.
transformers.utils.logging.disable_progress_bar()

LONGEST = 300  # characters of another library's message
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(source: ModelSource, folder: Path) -> None:
    """Write a GGUF, ONNX or tiny model as a plain checkpoint folder: safetensors, config.json, tokenizer."""
    if source.kind == "tiny":
        tiny.build(source.location, folder)
        return
    if source.kind == "onnx":
        from lowrank_lab.models import onnx_conversion

        onnx_conversion.convert(Path(source.location), folder)
        return
    from lowrank_lab.models import gguf_conversion

    gguf_conversion.convert(Path(source.location), folder)


def load_config(location: str, revision: str | None, trust_remote_code: bool, **where: Any) -> Any:
    """The transformers configuration of a model; ``where`` holds more arguments for transformers.

    Raises UserError for one that needs its own code, and for one that transformers cannot read.
    """
    with _one_line(location, "its config.json"):
        found = AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code, **where
        )
    entry = quantized_by_others.entry_in(found.to_dict())
    if entry is not None and "gguf_file" not in where:  # folder_check.py lets pass models whose weights are floats
        log.info("%s: its weights are floats: the quantization in its config.json (%s) is ignored", location, entry)
        for name in quantized_by_others.ENTRIES:
            if hasattr(found, name):
                delattr(found, name)
    return found


def skeleton(model_config: Any, trust_remote_code: bool, auto: Any = AutoModelForCausalLM) -> Any:
    """The model of ``load_config`` without weights, for shapes. Raises UserError for sizes that make no model.

    ``auto`` is the class of transformers that chooses the class of the model.
    """
    with _one_line(model_config.name_or_path, "its config.json"), torch.device("meta"):
        return auto.from_config(model_config, trust_remote_code=trust_remote_code)


def load_model(location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A causal language model in evaluation mode, on the CPU, in ``dtype``, its key-value cache off.

    Raises UserError for one whose weights or files would run code that the user has not allowed, and for weights
    that are not those of the model.
    """
    model = _loaded(location, revision, trust_remote_code, dtype=DTYPES[dtype])
    model.config.use_cache = False
    return model.eval()


def load_image_model(
    location: str, revision: str | None, dtype: str, trust_remote_code: bool, auto: Any
) -> nn.Module:
    """The same for a model of images, whose class ``auto`` of transformers chooses."""
    return _loaded(location, revision, trust_remote_code, auto, dtype=DTYPES[dtype]).eval()


def check_model(location: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises UserError as ``load_model`` and ``load_tokenizer`` do; no values of weights are read."""
    _loaded(location, revision, trust_remote_code, device_map="meta")
    load_tokenizer(location, revision, trust_remote_code)


def check_image_model(location: str, revision: str | None, trust_remote_code: bool, auto: Any) -> None:
    """Raises UserError as ``load_image_model`` and ``load_image_processor`` do; no values of weights are read."""
    _loaded(location, revision, trust_remote_code, auto, device_map="meta")
    load_image_processor(location, revision, trust_remote_code)


def load_tokenizer(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a model. Raises UserError for one that needs its own code, or that cannot be read."""
    with _one_line(location, "its tokenizer"):
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)


def load_image_processor(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The image processor of a model, with Pillow where torchvision is absent. Raises UserError as the above."""
    # That of the package needs torchvision. Not above: it imports the quantizers, which import lowrank_lab.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    with _one_line(location, "its preprocessor_config.json"), _without_report():
        return AutoImageProcessor.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code, backend="pil"
        )


def load_processor(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The processor of a model of images and text, with Pillow where it has such. Raises UserError as the above."""
    from transformers import AutoProcessor

    try:
        with _one_line(location, "its processor"), _without_report():
            return AutoProcessor.from_pretrained(
                location, revision=revision, trust_remote_code=trust_remote_code, backend="pil"
            )
    except UserError as error:
        missing = str(error.__cause__)
        if needed := [name for name in ("torchvision", "num2words") if name in missing]:
            raise UserError(
                f"model.path={location}: its processor needs {' and '.join(needed)}; run: pip install "
                f"{' '.join(needed)}"
            ) from None
        raise


def check_image_text_model(location: str, revision: str | None, trust_remote_code: bool, auto: Any) -> None:
    """Raises UserError as ``load_image_model`` and ``load_processor`` do; no values of weights are read."""
    _loaded(location, revision, trust_remote_code, auto, device_map="meta")
    load_processor(location, revision, trust_remote_code)


def _loaded(
    location: str, revision: str | None, trust_remote_code: bool, auto: Any = AutoModelForCausalLM, **how: Any
) -> Any:
    """The model of ``location``, whose weights are all its own: transformers draws at random what a file lacks."""
    model_config = load_config(location, revision, trust_remote_code)
    if (generation := generation_settings.readable(location, revision)) is not None:
        how["generation_config"] = generation
    with _one_line(location, "its weights"), _without_report():
        # transformers reads .bin files, which are pickles, with torch's weights_only.
        model, found = auto.from_pretrained(
            location,
            config=model_config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # else it stops at the first with a message of many lines
            output_loading_info=True,
            **how,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model.path={location}: an adapter lies beside the model: {MERGE}")
    if wrong := differences(found):
        raise UserError(
            f"model.path={location}: its weights are not those of a {type(model).__name__} as its config.json "
            f"describes it: {wrong}"
        )
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Within it, transformers does not print its table of the weights that differ; the error names them."""
    logger = logging.getLogger("transformers.modeling_utils")
    no_report = lambda record: not any(words in record.getMessage() for words in ("LOAD REPORT", "seem corrupted"))
    logger.addFilter(no_report)
    try:
        yield
    finally:
        logger.removeFilter(no_report)


@contextmanager
def _one_line(location: str, what: str) -> Iterator[None]:
    """Raises UserError where transformers or torch cannot read ``what`` of a model, or refuse to run its code."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(f"model.path={location}: {RUNS_CODE}") from None
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error) or disk_full(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path={location}: the model needs Python code that comes with it, which is not run unless "
                "you say model.trust_remote_code=true; read it first"
            ) from None
        first_sentence = re.split(r"(?<=\.)\s", " ".join(str(error).split()))[0]
        raise UserError(
            f"model.path={location}: transformers {transformers.__version__} cannot read {what} "
            f"({type(error).__name__}: {first_sentence[:LONGEST]})"
        ) from error
