"""How the benchmarks measure time: by turns, and by the processor's clock, for other work shares the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, over all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def fastest(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """By name, the processor seconds of the fastest of ``repeats`` calls, which other work disturbs least.

    The calls take turns, so that what slows the machine for a while slows them all.
    """
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: min(turn[name] for turn in turns) for name in calls}


def rounded(facts: Mapping[str, object]) -> dict[str, object]:
    """``facts`` with three significant digits, for printing."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in facts.items()}
