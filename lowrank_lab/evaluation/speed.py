"""Tokens a second and memory of prefill and decoding, and the speed-up that the arithmetic predicts.

A measurement is the prefill of one prompt of random tokens (it fills the key-value cache, and lm_head computes the
logits of the last position, as in transformers' generate) and ``new_tokens`` steps of greedy decoding with the
cache. Measurements of the compressed and the dense model alternate, so that a machine that slows down slows both.
The result is the median, over pairs of consecutive measurements, of their ratio. macs.py counts the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.models.families import kv_cache_shape
from lowrank_lab.process import environment, progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.evaluation import macs, timing
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    macs = LazyModule("lowrank_lab.evaluation.macs")
    timing = LazyModule("lowrank_lab.evaluation.timing")

PHASES = ("prefill", "decode")


class Speed(Evaluator):
    """Tokens a second and memory of prefill and decoding, against the dense model in the same run.

    batch_sizes  each is measured at the first of ``seqlens``
    seqlens      prompt lengths in tokens; each is measured at the first of ``batch_sizes``
    new_tokens   tokens decoded after each prompt
    repeats      measurements of each model in each setting; dense and compressed alternate
    warmup       unmeasured ones before them

    The number depends on the machine, which is part of its key.
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
        return {"": environment.machine_with(cfg.device)}

    def check(self, context: Context) -> None:
        saved = context.cell.saved
        if saved is not None and saved.online:
            raise SkippedCell("eval=speed compares with a dense model; this checkpoint cannot be converted to one")
        if kv_cache_shape(context.model_config) is None:
            raise SkippedCell("eval=speed times decoding with keys and values in a cache, which this model has not")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the median decode speed-up in the first setting, everything else, and the protocol."""
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


def measure(
    models: timing.Models,
    settings: Sequence[tuple[int, int]],
    new_tokens: int,
    repeats: int,
    warmup: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measure ``model`` of ``models`` against ``dense`` (against itself where there is none) in all ``settings``.

    A setting is (batch size, prompt length). Returns

    value          the median ratio of decode speeds, model over dense, in the first setting; None, with ``reason``,
                   where one of them does not fit into memory
    settings       for each what ``_compare`` finds
    macs           by model what ``macs.count_macs`` finds after the shortest prompt; None where memory runs out
    weight_bytes   by model, of all its weights
    ideal          the decode speed-up if time were proportional to the linears' multiply-accumulates (``macs``),
                   and to their bytes (``bytes``)
    conditions     for the protocol: threads of torch, and how many jobs ran on the machine when it began
    """
    conditions = timing.conditions()
    with torch.no_grad():
        shortest = min(length for _, length in settings)
        prompt = _prompts(models["model"], 1, shortest, device)
        count = partial(macs.count_macs, prompt=prompt)
        counted = {name: timing.alone(models, name, device, count) for name in models}
        compared = [
            _compare(models, *setting, new_tokens, repeats, warmup, device)
            for setting in progress.track(settings, "speed", "setting")
        ]
    ratio = compared[0]["decode_ratio"]
    return {
        "value": None if ratio is None else ratio["median"],
        **({"reason": "out of memory in the first setting"} if ratio is None else {}),
        "settings": compared,
        "macs": counted,
        "weight_bytes": {name: macs.weight_bytes(model) for name, model in models.items()},
        "ideal": macs.ideal(models.get("dense", models["model"]), models["model"]),
        "conditions": conditions,
    }


def _compare(
    models: timing.Models, batch: int, length: int, new_tokens: int, repeats: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """All that is measured in one setting.

    model, dense     ``prefill`` and ``decode``, each with the ``seconds`` of all repeats and, by their median,
                     ``tokens_per_second``; ``memory_bytes``, the peak on top of the weights, on a GPU with no other
                     model there (None where the system does not report it); ``kv_cache_bytes_per_token``, of the
                     cache after the prefill. None where the setting does not fit into memory
    prefill_ratio, decode_ratio   median and quartiles over the repeats of model over dense; None where one is
    ideal_prefill    the prefill speed-up if time were proportional to the linears' multiply-accumulates
    """
    prompts = _prompts(models["model"], batch, length, device)
    found: dict[str, dict[str, Any]] = {}
    for name in models:
        memory = timing.alone(models, name, device, partial(_memory, prompts=prompts, new_tokens=new_tokens))
        if memory is not None:
            found[name] = memory
    run = partial(_run, prompts=prompts, new_tokens=new_tokens)
    seconds = timing.alternate(models, list(found), run, repeats, warmup, device)
    tokens = {"prefill": batch * length, "decode": batch * new_tokens}
    for name, of_model in seconds.items():
        for phase in PHASES:
            speed = tokens[phase] / float(np.median(of_model[phase]))
            found[name][phase] = {"tokens_per_second": speed, "seconds": of_model[phase]}
    reference = "dense" if "dense" in models else "model"
    both = {"model", reference} <= set(found)
    ratios = {
        f"{phase}_ratio": timing.spread(seconds[reference][phase], seconds["model"][phase]) if both else None
        for phase in PHASES
    }
    ideal = macs.prefill_macs(models[reference], length) / macs.prefill_macs(models["model"], length)
    return {
        "batch_size": batch,
        "prompt": length,
        "model": found.get("model"),
        "dense": found.get(reference),
        **ratios,
        "ideal_prefill": ideal,
    }


def _run(model: nn.Module, prompts: Tensor, new_tokens: int) -> dict[str, float]:
    """The seconds of one prefill and of decoding after it."""
    (cache, tokens), prefill = timing.timed(lambda: macs.prefill(model, prompts), prompts.device)
    _, decode = timing.timed(lambda: macs.decode(model, cache, tokens, new_tokens), prompts.device)
    return dict(zip(PHASES, (prefill, decode), strict=True))


def _memory(model: nn.Module, prompts: Tensor, new_tokens: int) -> dict[str, Any]:
    """The peak memory of one measurement on top of the weights, and the bytes of the key-value cache of a token."""
    cached = 0

    def work() -> None:
        nonlocal cached
        cache, tokens = macs.prefill(model, prompts)
        cached = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        macs.decode(model, cache, tokens, new_tokens)

    peak = environment.memory_on_top(work, prompts.device)
    return {"memory_bytes": peak, "kv_cache_bytes_per_token": cached / prompts.numel()}


def _prompts(model: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """Random token ids (batch, length): their values do not change how long dense products take."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)
