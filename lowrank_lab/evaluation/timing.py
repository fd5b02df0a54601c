"""How fast a model reads a prompt and decodes, what memory it takes, and what arithmetic would lead one to expect.

A measurement is one prompt of random tokens read at once (prefill: the key-value cache is filled, and lm_head gives
the logits of the last position, as in transformers' generate) and ``new_tokens`` steps of greedy decoding with the
cache. A compressed model and the dense one take turns, so that a machine that slows down slows both, and what is
reported of them is the median of the ratios of neighbours.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lowrank_lab import environment, progress
from lowrank_lab.modules.base import nbytes
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.steps import steps_in
from lowrank_lab.out_of_memory import unless_out_of_memory

T = TypeVar("T")
Models: TypeAlias = Mapping[str, nn.Module]
PHASES = ("prefill", "decode")


def measure(
    models: Models,
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
    macs           by model what ``count_macs`` finds after the shortest prompt; None where memory runs out
    weight_bytes   by model, of all its weights
    ideal          the decode speed-up if time went with the linears' multiply-accumulates (``macs``), and if it
                   went with their bytes (``bytes``)
    conditions     for the protocol: threads of torch, and how many jobs ran on the machine when it began
    """
    conditions = {"threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2)}
    dense, model = models.get("dense", models["model"]), models["model"]
    with torch.no_grad():
        shortest = min(length for _, length in settings)
        prompt = _prompts(models["model"], 1, shortest, device)
        macs = {name: _alone(models, name, device, partial(count_macs, prompt=prompt)) for name in models}
        compared = [
            _compare(models, *setting, new_tokens, repeats, warmup, device)
            for setting in progress.track(settings, "speed", "setting")
        ]
    ratio = compared[0]["decode_ratio"]
    return {
        "value": None if ratio is None else ratio["median"],
        **({"reason": "out of memory in the first setting"} if ratio is None else {}),
        "settings": compared,
        "macs": macs,
        "weight_bytes": {name: nbytes(*m.parameters()) for name, m in models.items()},
        "ideal": {
            "macs": count(dense).macs / count(model).macs,
            "bytes": _linear_bytes(dense) / _linear_bytes(model),
        },
        "conditions": conditions,
    }


def count_macs(model: nn.Module, prompt: Tensor) -> dict[str, int]:
    """Multiply-accumulates of the first token decoded after ``prompt`` (1, length), by torch's own counter.

    ``linears`` of all linear layers, ``steps`` of what a quantization does to their inputs, ``attention`` of the
    products with ``context`` keys and values (and of the angles of rotary embeddings, a few dozen). Raises
    RuntimeError where the shapes say something else than what runs, for the prompt or for that token: one of them
    would be a bug.
    """
    with _counter() as of_prefill:
        cache, token = _prefill(model, prompt)
    with _counter() as of_step:
        _decode(model, cache, token, 1)
    expected = (prefill_macs(model, prompt.shape[1]), count(model).macs)
    counted = (_linear_macs(of_prefill, model), _linear_macs(of_step, model))
    if counted != expected:
        raise RuntimeError(f"the linears run {counted} multiply-accumulates, their shapes say {expected}")
    steps = sum(_steps_flops(of_step, model).values()) // 2
    attention = of_step.get_total_flops() // 2 - counted[1] - steps
    return {"linears": counted[1], "steps": steps, "attention": attention, "context": prompt.shape[1] + 1}


def prefill_macs(model: Any, length: int) -> int:
    """Multiply-accumulates of all linears for a prompt of ``length`` tokens, lm_head only for the last."""
    head = model.get_output_embeddings().weight.numel()
    return length * (count(model).macs - head) + head


def _counter() -> FlopCounterMode:
    """torch's counter, which does not know the CPU's attention kernel by itself."""
    count = lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _linear_macs(counter: FlopCounterMode, model: nn.Module) -> int:
    """Those of two-dimensional products without those of steps: attention's are batched or one kernel."""
    counts, of_steps = counter.get_flop_counts()["Global"], _steps_flops(counter, model)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(counts.get(product, 0) - of_steps[product] for product in products) // 2


def _steps_flops(counter: FlopCounterMode, model: nn.Module) -> Counter[Any]:
    """By kernel, what the counter found in the steps in front of linears."""
    counts, found = counter.get_flop_counts(), Counter[Any]()
    for path in steps_in(model):
        found.update(counts.get(f"{type(model).__name__}.{path}", {}))
    return found


def _linear_bytes(model: nn.Module) -> int:
    return nbytes(*count(model).weights)


def _compare(
    models: Models, batch: int, length: int, new_tokens: int, repeats: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """All that is measured in one setting.

    model, dense     ``prefill`` and ``decode``, each with the ``seconds`` of all repeats and, by their median,
                     ``tokens_per_second``; ``memory_bytes``, the peak on top of the weights, on a GPU with no other
                     model there (None where the system does not tell); ``kv_cache_bytes_per_token`` as found in the
                     cache after the prefill. None where the setting does not fit into memory
    prefill_ratio, decode_ratio   median and quartiles over the repeats of model over dense; None where one is
    ideal_prefill    the prefill speed-up if time went with the linears' multiply-accumulates
    """
    prompts = _prompts(models["model"], batch, length, device)
    found: dict[str, dict[str, Any]] = {}
    for name in models:
        memory = _alone(models, name, device, partial(_memory, prompts=prompts, new_tokens=new_tokens))
        if memory is not None:
            found[name] = memory
    seconds = _take_turns(models, list(found), prompts, new_tokens, repeats, warmup)
    tokens = {"prefill": batch * length, "decode": batch * new_tokens}
    for name, of_model in seconds.items():
        for phase in PHASES:
            speed = tokens[phase] / float(np.median(of_model[phase]))
            found[name][phase] = {"tokens_per_second": speed, "seconds": of_model[phase]}
    reference = "dense" if "dense" in models else "model"
    both = {"model", reference} <= set(found)
    ratios = {
        f"{phase}_ratio": _spread(seconds[reference][phase], seconds["model"][phase]) if both else None
        for phase in PHASES
    }
    ideal = prefill_macs(models[reference], length) / prefill_macs(models["model"], length)
    return {
        "batch_size": batch,
        "prompt": length,
        "model": found.get("model"),
        "dense": found.get(reference),
        **ratios,
        "ideal_prefill": ideal,
    }


def _take_turns(
    models: Models, fitting: Sequence[str], prompts: Tensor, new_tokens: int, repeats: int, warmup: int
) -> dict[str, dict[str, list[float]]]:
    """By model and phase the seconds of every repeat; the model that went second goes first in the next.

    Only the ``fitting`` of ``models`` run; on a GPU the others are moved away.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in fitting}

    def warm_up(names: Sequence[str]) -> bool:
        _bring(models, names, prompts.device)
        for name in names:
            for _ in range(warmup):
                _run(models[name], prompts, new_tokens)
        return True

    together = unless_out_of_memory(lambda: warm_up(fitting)) is not None
    for repeat in range(repeats):
        for name in fitting if repeat % 2 == 0 else fitting[::-1]:
            if not together:  # each fits alone, but not both
                warm_up([name])
            for phase, taken in zip(PHASES, _run(models[name], prompts, new_tokens), strict=True):
                seconds[name][phase].append(taken)
    return seconds


def _run(model: nn.Module, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
    """The seconds of one prefill and of decoding after it."""
    (cache, tokens), prefill = _timed(lambda: _prefill(model, prompts), prompts.device)
    _, decode = _timed(lambda: _decode(model, cache, tokens, new_tokens), prompts.device)
    return prefill, decode


def _prefill(model: nn.Module, prompts: Tensor) -> tuple[Any, Tensor]:
    """The key-value cache after ``prompts`` (batch, length), and the next tokens (batch, 1)."""
    output = model(prompts, use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits.argmax(-1)


def _decode(model: nn.Module, cache: Any, tokens: Tensor, steps: int) -> None:
    """``steps`` forwards of one token a sequence; ``cache`` grows."""
    for _ in range(steps):
        tokens = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
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


def _memory(model: nn.Module, prompts: Tensor, new_tokens: int) -> dict[str, Any]:
    """What one measurement holds on top of the weights, and what of it is the key-value cache of a token."""
    cached = 0

    def work() -> None:
        nonlocal cached
        cache, tokens = _prefill(model, prompts)
        cached = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        _decode(model, cache, tokens, new_tokens)

    peak = environment.memory_on_top(work, prompts.device)
    return {"memory_bytes": peak, "kv_cache_bytes_per_token": cached / prompts.numel()}


def _prompts(model: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """Random token ids (batch, length): what the tokens are does not change how long dense products take."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)


def _bring(models: Models, names: Sequence[str], device: torch.device) -> None:
    """Have these models on ``device``, and on a GPU no others."""
    for name, model in models.items():
        if name not in names:
            model.to("cpu")
    for name in names:
        models[name].to(device)


def _alone(models: Models, name: str, device: torch.device, work: Callable[[nn.Module], T]) -> T | None:
    """``work`` on one model, on a GPU with no other there; None where memory runs out."""

    def bring_and_work() -> T:
        _bring(models, [name], device)
        return work(models[name])

    return unless_out_of_memory(bring_and_work)


def _spread(reference: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of how many times faster than ``reference`` the ``seconds`` are, pair by pair."""
    q1, median, q3 = np.quantile(np.array(reference) / np.array(seconds), (0.25, 0.5, 0.75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}
