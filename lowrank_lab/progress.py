"""Progress of long work: nested bars on a terminal, plain lines with times in a log file or a pipe."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowrank_lab import stopping

log = logging.getLogger(__name__)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0
_bars: Progress | None = None
_grid: TaskID | None = None
_depth = 0


class ConsoleHandler(logging.Handler):
    """Log lines on stderr, above the bars where there are some (see conf/hydra/job_logging)."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if _bars is not None:
            _bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Iterate over ``items`` and show the progress. Calls nest: an inner one is a bar below the outer.

    ``total`` is only needed for iterables without a length.
    """
    global _depth
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    _depth += 1
    try:
        yield from (_track_bar(items, name, total) if _on_terminal() else _track_lines(items, name, unit, total))
    finally:
        _depth -= 1


@contextmanager
def grid(cells: int) -> Iterator[None]:
    """Show the progress of a grid within it: an outermost bar that ``cell_done`` advances."""
    global _grid
    if not _on_terminal():
        yield
        return
    with _shared_bars() as bars:
        _grid = bars.add_task("grid", total=cells)
        try:
            yield
        finally:
            _grid = None


def cell_done() -> None:
    """Advance the bar of the grid: a cell is done, failed or skipped."""
    if _grid is not None and _bars is not None:
        _bars.advance(_grid)


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def _track_bar(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    with _shared_bars() as bars:
        task = bars.add_task(name, total=total)
        try:
            for item in items:
                stopping.check()
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)


def _track_lines(items: Iterable[T], name: str, unit: str, total: int) -> Iterator[T]:
    """Log a line from time to time; an inner loop logs none at its end, as the outer loop's lines are enough."""
    inner = _depth > 1
    start = last = time.monotonic()
    for number, item in enumerate(items, 1):
        stopping.check()
        yield item
        now = time.monotonic()
        if (number == total and not inner) or now - last >= SECONDS_BETWEEN_LINES:
            left = (now - start) / number * (total - number)
            log.info("%s: %s %d/%d, %.0f s, %.0f s left", name, unit, number, total, now - start, left)
            last = now


@contextmanager
def _shared_bars() -> Iterator[Progress]:
    """The one Progress that nested calls share; the outermost starts and stops it."""
    global _bars
    if _bars is not None:
        yield _bars
        return
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    _bars = Progress(*columns, *times, console=Console(stderr=True), transient=True)
    try:
        with _bars:
            yield _bars
    finally:
        _bars = None
