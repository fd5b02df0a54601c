"""Checkpoints of compressed models: what they say, and how they are written.

The import of this module registers with transformers what loads them (loading.py), with the readers of old versions
and all kinds of modules; ``import lowrank_lab`` does it. Where lowrank_lab is missing, the code beside a checkpoint
loads it, which bundle.py takes out of the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_lab.checkpoints import loading
from lowrank_lab.checkpoints.bundle import code_of
from lowrank_lab.checkpoints.casting import in_dtype
from lowrank_lab.checkpoints.description import QUANT_METHOD, Saved, in_present_version
from lowrank_lab.checkpoints.loading import merge
from lowrank_lab.models.generation_settings import saveable
from lowrank_lab.modules.attention import cache_of, round_cache
from lowrank_lab.modules.base import Replacement
from lowrank_lab.modules.cache_format import CacheFormat
from lowrank_lab.modules.rebuild import check_kinds, describe_modules, register_kinds
from lowrank_lab.modules.site import Sites

__all__ = ["describe", "merge", "save"]  # loading.py is not imported before this module, which transformers imports


class LowRankConfig(loading.LowRankConfig):
    """Reads old versions too."""

    def __init__(self, **content: Any) -> None:
        super().__init__(**in_present_version(content))


class LowRankQuantizer(loading.LowRankQuantizer):
    """Knows the modules of checkpoints from before caches were listed among them."""

    def _process_model_before_weight_loading(self, model: Any, **rest: Any) -> Any:
        model = super()._process_model_before_weight_loading(model, **rest)
        cache = self.quantization_config.saved.kv_cache
        if cache is not None and cache_of(model) is None:
            round_cache(model, CacheFormat(**cache))
        return model

    def code(self, model: Any) -> str | None:
        return code_of(model)


register_kinds()
loading.register(QUANT_METHOD, LowRankConfig, LowRankQuantizer)


def describe(model: nn.Module, sites: Sites, ranks: dict[str, int | None], method: str, ratio: float) -> Saved:
    """How ``model`` was compressed. Raises UserError for a storage that checkpoints cannot hold."""
    for name, site in sites.items():
        for member in site.members if ranks[name] is not None else ():
            path = f"{name.removesuffix(site.key)}{member}"
            check_kinds(model.get_submodule(path), path)
    modules, cache = describe_modules(model), cache_of(model)
    kinds = [Replacement.of_kind(description["kind"]) for description in modules.values()]
    online = cache is not None or any(kind.online for kind in kinds)
    return Saved(
        method,
        ratio,
        dict(sites),
        dict(ranks),
        modules,
        is_quantized=online or any(kind.quantized for kind in kinds),
        online=online,
        kv_cache=None if cache is None else asdict(cache),
    )


def save(
    folder: Path, model: Any, processor: Any, use_cache: bool | None, saved: Saved | None, dtype: str | None = None
) -> None:
    """Write ``model`` as a folder: safetensors, config.json, generation config, tokenizer or image processor.

    ``saved`` describes how it was compressed (None: it is dense), ``use_cache`` is the value in its original
    config (None: it has none). Tied tensors are stored once. The weights are written in ``dtype``, by default their
    own; tensors with a fixed dtype keep it. Raises UserError where a weight is too large for it.
    """
    with _saveable_generation_config(model), in_dtype(model, saved, dtype):
        # transformers has old names for tensors of some dense models; tensors of factors have the names of modules.
        type(model).save_pretrained(model, folder, save_original_format=saved is None)
    processor.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict):  # that of a model which others had quantized is no longer true
            part.pop("quantization_config", None)
            if "dtype" in part:
                part["dtype"] = config["dtype"]
    if use_cache is not None:
        config["use_cache"] = use_cache
    if saved is not None:
        config["quantization_config"] = saved.to_dict()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if saved is not None:
        loading.finish(folder, code_of(model))


@contextmanager
def _saveable_generation_config(model: Any) -> Iterator[None]:
    original = getattr(model, "generation_config", None)
    if original is not None:
        model.generation_config = saveable(original)
    try:
        yield
    finally:
        if original is not None:
            model.generation_config = original
