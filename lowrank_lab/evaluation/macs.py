"""The arithmetic of prefill and decoding: counted while it runs, and expected from the shapes of the linears."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lowrank_lab.modules.base import nbytes
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.steps import steps_in


def prefill(model: nn.Module, prompts: Tensor) -> tuple[Any, Tensor]:
    """The key-value cache after ``prompts`` (batch, length), and the next tokens (batch, 1)."""
    output = model(prompts, use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits.argmax(-1)


def decode(model: nn.Module, cache: Any, tokens: Tensor, steps: int) -> None:
    """``steps`` forwards of one token a sequence; ``cache`` grows."""
    for _ in range(steps):
        tokens = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def ideal(dense: nn.Module, model: nn.Module) -> dict[str, float]:
    """The decode speed-ups if time were proportional to the linears' multiply-accumulates, and to their bytes.

    The bytes are of the weights as they are stored (``Counts.weights``): a forward that first makes dense ones of
    them cannot reach that.
    """
    return {
        "macs": count(dense).macs / count(model).macs,
        "bytes": _linear_bytes(dense) / _linear_bytes(model),
    }


def weight_bytes(model: nn.Module) -> int:
    """Those of all its weights."""
    return nbytes(*model.parameters())


def count_macs(model: nn.Module, prompt: Tensor) -> dict[str, int]:
    """Multiply-accumulates of the first token decoded after ``prompt`` (1, length), by torch's own counter.

    ``linears`` of all linear layers, ``steps`` of what a quantization does to their inputs, ``attention`` of the
    products with ``context`` keys and values (and of the angles of rotary embeddings, a few dozen). Raises
    RuntimeError where the counts differ from those of the shapes, for the prompt or for that token: a bug in one of
    them.
    """
    with counter() as of_prefill:
        cache, token = prefill(model, prompt)
    with counter() as of_step:
        decode(model, cache, token, 1)
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


def counter() -> FlopCounterMode:
    """torch's counter with a formula for the CPU's attention kernel, which torch does not count."""
    count = lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _linear_macs(counter: FlopCounterMode, model: nn.Module) -> int:
    """Of two-dimensional products, without those of steps; the products of attention are batched or one kernel."""
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
