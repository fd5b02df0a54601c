"""Keys and values in few bits. No torch: modules/attention.py rounds them."""

from __future__ import annotations

from lowrank_lab.modules.cache_format import CacheFormat


class KvCache(CacheFormat):
    """The format as a part of a quantization."""
