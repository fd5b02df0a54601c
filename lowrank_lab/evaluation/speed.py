"""The ``eval=speed`` evaluator: its protocol as data. timing.py, which needs torch, measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lowrank_lab import checks, environment
from lowrank_lab.artifacts.store import Store
from lowrank_lab.cells import versions
from lowrank_lab.errors import SkippedCell
from lowrank_lab.evaluation.base import Evaluator
from lowrank_lab.models.families import kv_cache_shape

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Speed(Evaluator):
    """Tokens a second and memory of prefill and decoding, against the dense model in the same run.

    batch_sizes  each is measured at the first of ``seqlens``
    seqlens      prompt lengths in tokens; each is measured at the first of ``batch_sizes``
    new_tokens   tokens decoded after each prompt
    repeats      measurements of each model in each setting, dense and compressed by turns
    warmup       unmeasured ones before them

    Its number is of one machine, which is part of its key.
    """

    version = versions.SPEED
    component = "SPEED"
    of_this_machine = True
    no_influence = ()

    def __init__(
        self, batch_sizes: Sequence[int], seqlens: Sequence[int], new_tokens: int, repeats: int, warmup: int
    ) -> None:
        for name, values in (("batch_sizes", batch_sizes), ("seqlens", seqlens)):
            if not isinstance(values, list) or not values or not all(checks.is_count(v, 1) for v in values):
                raise ValueError(f"{name}={values} is not valid; it must be a list of whole numbers from 1")
        checks.whole(1, new_tokens=new_tokens, repeats=repeats, warmup=warmup)
        across = [(batch, seqlens[0]) for batch in batch_sizes] + [(batch_sizes[0], length) for length in seqlens]
        self.settings_measured = list(dict.fromkeys(across))
        self.new_tokens = new_tokens
        self.repeats = repeats
        self.warmup = warmup
        self.longest = max(seqlens) + new_tokens

    def lengths(self) -> dict[str, int]:
        return {"seqlens and new_tokens": self.longest}

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        machine = environment.machine()
        device = ("cuda" if machine["gpus"] else "cpu") if cfg.device == "auto" else cfg.device
        return {"": {**machine, "device": device}}

    def check(self, context: Context) -> None:
        saved = context.cell.source.saved
        if saved is not None and saved.online:
            raise SkippedCell("eval=speed compares with a dense model, which this checkpoint cannot be made into")
        if kv_cache_shape(context.model_config) is None:
            raise SkippedCell("eval=speed times decoding with keys and values in a cache, which this model has not")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the median decode speed-up in the first setting, everything else, and the protocol."""
        from lowrank_lab.evaluation.timing import measure

        models = {"model": context.model}
        if context.cell.kind != "dense":
            models = {"dense": context.dense_model(), **models}
        work = (self.settings_measured, self.new_tokens, self.repeats, self.warmup)
        measured = measure(models, *work, context.device)
        protocol = {
            **measured.pop("conditions"),
            **environment.machine(),
            "device": context.device.type,
            "gpu": environment.hardware(context.device).get("gpu"),
            "dtype": context.cell.cfg.dtype,
            "settings": [list(setting) for setting in self.settings_measured],
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "warmup": self.warmup,
        }
        return {"metric": "speed", **measured, "protocol": protocol}
