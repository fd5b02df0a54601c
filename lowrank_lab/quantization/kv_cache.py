"""Keys and values in few bits. No torch: modules/attention.py rounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.modules.cache_format import CacheFormat

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class KvCache(CacheFormat):
    """The format as a part of a quantization."""

    def __call__(self, context: Context) -> None:
        """Have ``context.model`` attend to rounded keys and values."""
        from lowrank_lab.modules.attention import round_cache

        round_cache(context.model, self)
