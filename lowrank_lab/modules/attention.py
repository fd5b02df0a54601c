"""Attention to rounded keys and values, as with a key-value cache in few bits.

transformers finds a model's attention and its mask by name. One more name for each implementation of attention
(attention_names.py) rounds keys and values and then does the same. Every token and head is rounded separately.
So the result is the same whether that happens once, when a token enters the cache, or at each read, as here; and
the forward of a whole text, which uses no cache, gives the same as decoding. Each attention module has its format,
so models in one process may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lowrank_lab.basics.errors import SkippedCell, named
from lowrank_lab.models.discovery import family_of
from lowrank_lab.models.families import head_size, kv_cache_shape
from lowrank_lab.models.vision_families import language_config
from lowrank_lab.modules.attention_names import AttentionFunction, use_attention
from lowrank_lab.modules.base import Replacement
from lowrank_lab.modules.cache_format import CacheFormat
from lowrank_lab.modules.steps import Hadamard, Round

NAMES = {"sdpa": "lowrank_lab_sdpa", "eager": "lowrank_lab_eager"}  # by transformers' name of each implementation


def round_cache(model: Any, cache: CacheFormat) -> None:
    """Have ``model``, also a bare one without lm_head, attend to keys and values rounded as ``cache`` says.

    Raises SkippedCell where its attention is none of ``NAMES``.
    """
    if kv_cache_shape(language_config(model.config)) is None:
        raise SkippedCell(f"{type(model).__name__} caches no keys and values")
    RoundedCache.set_up(model)
    for name, attention in _attentions(model):
        size = head_size(language_config(model.config))
        attention.kv_cache = RoundedCache(CacheFormat(**asdict(cache)), size, name)


def cache_of(model: Any) -> CacheFormat | None:
    """The format that ``round_cache`` has set for ``model``; None where its keys and values are not rounded."""
    return next((module.cache for module in model.modules() if isinstance(module, RoundedCache)), None)


class RoundedCache(Replacement):
    """Rounds keys and values (batch, heads, length, head size), perhaps after a rotation of queries and keys.

    It is added to a module with attention as ``kv_cache``.
    """

    kind = "rounded_cache"
    online = True

    def __init__(self, cache: CacheFormat, head_size: int, name: str = "attention") -> None:
        super().__init__()
        self.cache, self.head_size = cache, head_size
        self.name = name  # of the attention, for messages
        self.rotation = Hadamard(head_size, 1) if cache.rotate else None
        self.rounding = Round(asdict(cache.form))

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> RoundedCache:
        return cls(CacheFormat(**description["format"]), description["head_size"])

    def describe(self) -> dict[str, Any]:
        return {"format": asdict(self.cache), "head_size": self.head_size}

    @classmethod
    def set_up(cls, model: Any) -> None:
        """Raises SkippedCell where the attention of ``model`` is none of ``NAMES``."""
        use_attention(model, NAMES, attend_to_rounded, "keys and values cannot be rounded")

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.rotation is not None:
            query = self.rotation(query.float()).to(query.dtype)
            key = self.rotation(key.float()).to(key.dtype)
        with named(self.name):
            return query, self.rounding(key), self.rounding(value)


def _attentions(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules in the blocks of ``model`` that hold the query projections, with their names."""
    tower = family_of(model).tower
    attention, bare = tower.attention, tower.blocks.partition(".")[2]
    if attention is None:
        raise SkippedCell(f"it is not known which linears give the keys and values of {type(model).__name__}")
    query = attention.query.rpartition(".")[2]
    inside = (f"{tower.blocks}.", f"{bare}.")  # not in an image encoder, which caches nothing
    return (
        (name, module)
        for name, module in model.named_modules()
        if query in module._modules and name.startswith(inside)
    )


def attend_to_rounded(
    original: AttentionFunction, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention ``original`` after rounding, where ``module`` has a cache."""
    if "kv_cache" in module._modules:
        query, key, value = module.kv_cache(query, key, value)
    return original(module, query, key, value, *args, **rest)
