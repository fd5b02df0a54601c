"""Perplexity with its protocol written down.

Non-overlapping windows of ``seqlen`` tokens over the whole text, each predicted from its own beginning; the
tail that does not fill a window is dropped, and the record says how long it was. The value is exp of the mean
over all predicted tokens of the negative log-likelihood, computed in float32.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.evaluation.robust import NotFiniteError, check_output, in_batches
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM, of_tokens

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

    Returns the perplexity (``value``), the mean negative log-likelihood in nats, and the count of predicted tokens.
    Where the logits are not finite both are None, and ``not_finite`` is the first layer that has such an output.
    Where the perplexity is too large for a float64, ``value`` is its largest number.
    """
    model.to(device)

    def losses(batch: Tensor) -> Tensor:
        batch = batch.to(device)
        losses = CAUSAL_LM.loss(model, of_tokens(batch), "none")
        check_output(model, batch, losses)
        return losses.sum(1, dtype=torch.float64).cpu()

    total = 0.0
    of_windows = progress.track(in_batches(windows, batch_size, losses), "perplexity", "window", len(windows))
    try:
        for loss in of_windows:
            total += loss.item()
    except NotFiniteError as error:
        return {"value": None, "mean_nll": None, "not_finite": error.layer}
    predicted = windows[:, 1:].numel()
    mean = total / predicted
    value = math.exp(mean) if mean < math.log(sys.float_info.max) else sys.float_info.max
    return {"value": value, "mean_nll": mean, "predicted_tokens": predicted}
