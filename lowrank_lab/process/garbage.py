"""Configurations are many small objects that point to each other, which Python looks through again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def collect_rarely() -> None:
    """Look for unused circles after 100,000 new objects, not after 700: a quarter of the time to compose."""
    gc.set_threshold(100_000, 20, 20)


@contextmanager
def collected_rarely() -> Iterator[None]:
    """``collect_rarely`` in the body alone: where models are, their memory must be free again soon."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
