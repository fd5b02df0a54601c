"""Progress of long work: nested bars on a terminal, plain lines with times in a log file or a pipe."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lowrank_lab.process import stopping

log = logging.getLogger(__name__)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0
QUIET_SECONDS = 8.0  # after these without a line, one says what is being done
_bars: Progress | None = None
_grid: Grid | None = None
_depth = 0
_last_line = 0.0  # when the last one was written
_doing: list[tuple[str, float]] = []  # what is being done, the innermost last, and since when


class Grid:
    """How far a grid is. ``total`` counts the cells to compute, without those that were finished before."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.task: TaskID | None = None

    @property
    def seconds_left(self) -> float | None:
        """None before the first cell is done."""
        return (time.monotonic() - self.start) / self.done * (self.total - self.done) if self.done else None


class ConsoleHandler(logging.Handler):
    """Log lines on stderr, above the bars where there are some (see conf/hydra/job_logging)."""

    def emit(self, record: logging.LogRecord) -> None:
        global _last_line
        _last_line = time.monotonic()
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
    """Show the progress of a grid of ``cells`` to compute within it; ``cell_done`` advances it."""
    global _grid
    _grid = Grid(cells)
    try:
        if _on_terminal():
            with _shared_bars() as bars:
                _grid.task = bars.add_task("grid", total=cells)
                yield
        else:
            yield
    finally:
        _grid = None


def cell_starts(label: str) -> None:
    """Show on the bar of the grid which cell is computed."""
    if _grid is not None and _grid.task is not None and _bars is not None:
        _bars.update(_grid.task, description=label)


def cell_done() -> None:
    """Advance the grid: one of the cells to compute is done, failed or skipped."""
    if _grid is None:
        return
    _grid.done += 1
    if _grid.task is not None and _bars is not None:
        _bars.advance(_grid.task)
    elif left := _grid.seconds_left:
        log.info("grid: cell %d/%d, about %s left", _grid.done, _grid.total, _duration(left))


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done within it: a bar of its own, or a line where there has been none for a while."""
    _doing.append((what, time.monotonic()))
    try:
        if _bars is None:
            yield
        else:
            task = _bars.add_task(what, total=None)
            try:
                yield
            finally:
                _bars.remove_task(task)
    finally:
        _doing.pop()


@contextmanager
def never_silent() -> Iterator[None]:
    """Log what is being done (``doing``) where there has been no line for QUIET_SECONDS; bars need no such line."""
    if _on_terminal():
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(QUIET_SECONDS / 8):
            now = time.monotonic()
            if _doing and now - _last_line >= QUIET_SECONDS:
                what, since = _doing[-1]
                log.info("%s: %.0f s so far", what, now - since)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class _Remaining(TimeRemainingColumn):
    """The time left: of a grid by the mean of its cells, of which there are few; else as rich estimates it."""

    def render(self, task: Task) -> Text:
        if _grid is None or task.id != _grid.task:
            return super().render(task)
        left = _grid.seconds_left
        return Text("-:--:--" if left is None else _duration(left), style="progress.remaining")


def _duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


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
    times = (TimeElapsedColumn(), _Remaining())
    _bars = Progress(*columns, *times, console=Console(stderr=True), transient=True)
    try:
        with _bars:
            yield _bars
    finally:
        _bars = None
