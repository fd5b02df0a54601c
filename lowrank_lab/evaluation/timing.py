"""Models that are timed in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn

from lowrank_lab.process.out_of_memory import unless_out_of_memory

T = TypeVar("T")
Models: TypeAlias = Mapping[str, nn.Module]


def conditions() -> dict[str, Any]:
    """For the protocol: threads of torch, and how many jobs run on the machine."""
    return {"threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2)}


def alternate(
    models: Models,
    fitting: Sequence[str],
    run: Callable[[nn.Module], Mapping[str, float]],
    repeats: int,
    warmup: int,
    device: torch.device,
) -> dict[str, dict[str, list[float]]]:
    """By model and phase the seconds of every repeat; the order of the models changes after each.

    ``run`` gives the seconds of each phase. Only the ``fitting`` of ``models`` run; on a GPU the others are moved
    away.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in fitting}

    def warm_up(names: Sequence[str]) -> bool:
        move(models, names, device)
        for name in names:
            for _ in range(warmup):
                run(models[name])
        return True

    together = unless_out_of_memory(lambda: warm_up(fitting)) is not None
    for repeat in range(repeats):
        for name in fitting if repeat % 2 == 0 else fitting[::-1]:
            if not together:  # each fits alone, but not both
                warm_up([name])
            for phase, taken in run(models[name]).items():
                seconds[name].setdefault(phase, []).append(taken)
    return seconds


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What ``work()`` returns and how many seconds it took; on a GPU, between events on its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start
    stream = torch.cuda.current_stream(device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.synchronize()
    start_event.record(stream)
    result = work()
    end_event.record(stream)
    end_event.synchronize()
    return result, start_event.elapsed_time(end_event) / 1000


def move(models: Models, names: Sequence[str], device: torch.device) -> None:
    """Move these models to ``device``, and all others off a GPU."""
    for name, model in models.items():
        if name not in names:
            model.to("cpu")
    for name in names:
        models[name].to(device)


def alone(models: Models, name: str, device: torch.device, work: Callable[[nn.Module], T]) -> T | None:
    """``work`` on one model, on a GPU with no other there; None where memory runs out."""

    def move_and_work() -> T:
        move(models, [name], device)
        return work(models[name])

    return unless_out_of_memory(move_and_work)


def spread(reference: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of how many times faster than ``reference`` the ``seconds`` are, pair by pair."""
    q1, median, q3 = np.quantile(np.array(reference) / np.array(seconds), (0.25, 0.5, 0.75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}
