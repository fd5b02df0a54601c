"""Perplexity with its protocol written down.

Non-overlapping windows of ``seqlen`` tokens over the whole text, each predicted from its own beginning; the
tail that does not fill a window is dropped, and the record says how long it was. The value is exp of the mean
over all predicted tokens of the negative log-likelihood, computed in float32.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank_lab import progress

Bos = Literal["text", "window"]


def windows_of(ids: np.ndarray, seqlen: int, max_windows: int | None, bos_id: int | None) -> Tensor:
    """Cut a token stream (tokens,) into (windows, seqlen). With ``bos_id`` each window begins with it."""
    content = seqlen if bos_id is None else seqlen - 1
    count = len(ids) // content
    if max_windows is not None:
        count = min(count, max_windows)
    windows = torch.from_numpy(ids[: count * content].reshape(count, content))
    if bos_id is None:
        return windows
    return torch.cat([torch.full((count, 1), bos_id, dtype=windows.dtype), windows], dim=1)


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Evaluate ``model`` on ``windows`` (windows, seqlen) of token ids.

    Returns the perplexity, the mean negative log-likelihood in nats, and how many tokens were predicted.
    Raises FloatingPointError, naming the window, where a loss is not finite.
    """
    model.to(device)
    total = 0.0
    predicted = 0
    batches = windows.split(batch_size)
    for number, batch in enumerate(progress.track(batches, "perplexity", "batch")):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss is not finite in window {number * batch_size} or soon after")
        total += losses.sum(dtype=torch.float64).item()
        predicted += losses.numel()
    mean = total / predicted
    if mean > 700:  # exp() of it is no float64
        raise FloatingPointError(f"the perplexity overflows: the mean negative log-likelihood is {mean:.0f} nats")
    return {"value": math.exp(mean), "mean_nll": mean, "predicted_tokens": predicted}
