"""A small training loop that resumes after a stop: for learned ranks and rotations, and for fine-tuning.

It is a standard loop: AdamW by default, a schedule from transformers, batches in an order that depends on the
seed. It exists so that all trainings resume in the same way, to the same numbers.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lowrank_lab.models.tasks.base import Batch
from lowrank_lab.models.walk import chosen, count_of
from lowrank_lab.process import progress

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two saves of the state
ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)


@dataclass(frozen=True)
class Recipe:
    """How to train: ``steps`` of ``batch_size`` sequences, ``micro_batch`` of them in a forward."""

    steps: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    schedule: str = "linear"  # a name of transformers.get_scheduler
    warmup: int = 0
    seed: int = 0
    max_norm: float | None = None  # of the gradient of all parameters together


def train(
    folder: Path,
    name: str,
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Batch], Tensor],
    samples: Batch | Tensor,
    recipe: Recipe,
    after_step: Callable[[], dict[str, Any]] = dict,
    optimizer_of: Callable[..., torch.optim.Optimizer] = ADAMW,
) -> list[dict[str, Any]]:
    """Train ``parameters`` in place; returns the history, one entry a step.

    ``loss_of`` gives the mean loss of some sequences or images. Each epoch reads the ``samples``, a batch or token
    ids (samples, length), in a new order. ``after_step`` adds facts to the history, as plain data. The loop saves
    its state in ``folder/<name>.state`` about once a minute and at the end; called again, it continues from there
    and ends with the same numbers, dropout included: each step seeds torch's generators. Raises FloatingPointError
    where a loss is not finite.
    """
    optimizer = optimizer_of(parameters, lr=recipe.learning_rate)
    scheduler = get_scheduler(recipe.schedule, optimizer, recipe.warmup, recipe.steps)
    state = folder / f"{name}.state"
    history: list[dict[str, Any]] = []
    if state.exists():
        history = _restore(state, parameters, optimizer, scheduler)
    saved = time.monotonic()
    steps = range(len(history), recipe.steps)
    for step in progress.track(steps, name, "step"):
        rows = _rows(step, recipe, count_of(samples))
        torch.manual_seed((recipe.seed * 1_000_003 + step) % 2**63)
        loss = 0.0
        for micro in rows.split(recipe.micro_batch):
            part = loss_of(chosen(samples, micro)) * (len(micro) / len(rows))
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            advice = "lower the learning rate" if step else "the model is not finite before it is trained"
            raise FloatingPointError(f"{name}: the loss is not finite at step {step}; {advice}")
        if recipe.max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        history.append({"step": step, "loss": loss, **after_step()})
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(state, parameters, optimizer, scheduler, history)
            saved = time.monotonic()
    _save(state, parameters, optimizer, scheduler, history)
    return history


def steps_of_epoch(samples: Batch | Tensor, batch_size: int) -> int:
    """The steps in which each of the samples is read once."""
    return -(-count_of(samples) // batch_size)


def of_epochs(history: Sequence[dict[str, Any]], an_epoch: int) -> dict[str, Any]:
    """What a record keeps of a training: its steps, and the mean loss of its first and last epoch."""
    losses = [step["loss"] for step in history]
    mean = lambda some: sum(some) / len(some)
    return {
        "steps": len(losses),
        "first_epoch_loss": mean(losses[:an_epoch]),
        "last_epoch_loss": mean(losses[-an_epoch:]),
    }


def _rows(step: int, recipe: Recipe, samples: int) -> Tensor:
    """Which sequences a step sees: the epochs' permutations, one after the other."""
    wanted = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
    return torch.tensor(
        [int(_order(number // samples, recipe.seed, samples)[number % samples]) for number in wanted]
    )


def _order(epoch: int, seed: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


def _save(
    state: Path, parameters: Sequence[nn.Parameter], optimizer: Any, scheduler: Any, history: list[Any]
) -> None:
    work = state.with_suffix(".tmp")
    torch.save(
        {
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "history": history,
        },
        work,
    )
    os.replace(work, state)


def _restore(state: Path, parameters: Sequence[nn.Parameter], optimizer: Any, scheduler: Any) -> list[Any]:
    try:
        # copy_ moves each tensor to the device of its parameter.
        saved = torch.load(state, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        log.warning(
            "%s cannot be read (%s): the training starts again from its first step",
            state,
            str(error).partition("\n")[0],
        )
        return []
    with torch.no_grad():
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return saved["history"]
