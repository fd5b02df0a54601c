"""Progress of long work: nested bars on a terminal, plain lines with times in a log file or a pipe."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0
_bars: Progress | None = None


class ConsoleHandler(logging.Handler):
    """Log lines on stderr, above the bars where there are some (see conf/hydra/job_logging)."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if _bars is not None:
            _bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items``, showing how far it is. Calls nest: an inner one is a bar below the outer.

    ``total`` is only needed for iterables without a length.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    if sys.stderr.isatty():
        yield from _track_bar(items, name, total)
    else:
        yield from _track_lines(items, name, unit, total)


def _track_bar(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    bars, outermost = _shared_bars()
    task = bars.add_task(name, total=total)
    try:
        for item in items:
            yield item
            bars.advance(task)
    finally:
        bars.remove_task(task)
        if outermost:
            _stop_bars()


def _track_lines(items: Iterable[T], name: str, unit: str, total: int) -> Iterator[T]:
    start = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if number == total or now - last >= SECONDS_BETWEEN_LINES:
            left = (now - start) / number * (total - number)
            log.info("%s: %s %d/%d, %.0f s, %.0f s left", name, unit, number, total, now - start, left)
            last = now


def _shared_bars() -> tuple[Progress, bool]:
    """The one Progress that nested calls share, and whether this call started it."""
    global _bars
    if _bars is not None:
        return _bars, False
    _bars = Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    _bars.start()
    return _bars, True


def _stop_bars() -> None:
    global _bars
    assert _bars is not None
    _bars.stop()
    _bars = None
