"""Perplexity with its protocol written down.

Non-overlapping windows of ``seqlen`` tokens over the whole text, each predicted from its own beginning; the
tail that does not fill a window is dropped, and the record says how long it was. The value is exp of the mean
over all predicted tokens of the negative log-likelihood, computed in float32.
"""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation.robust import NotFiniteError, check_output, in_batches
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.models.tasks import causal_lm
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    causal_lm = LazyModule("lowrank_lab.models.tasks.causal_lm")


log = logging.getLogger(__name__)
IMPLAUSIBLE = 300.0  # of a dense model; 7B models have 5 to 20 on the papers' texts, the smallest ones below 100


class Perplexity(WindowEvaluator):
    """Perplexity on a text. Where that of the dense model is not plausible, ``warning`` says so."""

    version = versions.PERPLEXITY
    component = "PERPLEXITY"

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value and its protocol."""
        windows, protocol = self.windows(context)
        measured = perplexity(context.model, windows, self.batch_size, context.device)
        if context.cell.kind == "dense" and (measured["value"] or 0) > IMPLAUSIBLE:
            measured["warning"] = (
                f"a perplexity of {measured['value']:.4g} is not one of a trained model on a text of its language: "
                "its weights or its tokenizer may be wrong"
            )
            if context.cell.source.kind != "tiny":  # these are random and meant to be
                log.warning(measured["warning"])
        return {"metric": "perplexity", **measured, "protocol": {**protocol, "loss": "token mean, float32"}}


def perplexity(model: nn.Module, windows: Tensor, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Evaluate ``model`` on ``windows`` (windows, seqlen) of token ids.

    Returns the perplexity (``value``), the mean negative log-likelihood in nats, and the count of predicted tokens.
    Where the logits are not finite both are None, and ``not_finite`` is the first layer that has such an output.
    Where the perplexity is too large for a float64, ``value`` is its largest number.
    """
    model.to(device)

    def losses(batch: Tensor) -> Tensor:
        batch = batch.to(device)
        of_tokens = causal_lm.CAUSAL_LM.loss(model, causal_lm.of_tokens(batch), "none")
        check_output(model, batch, of_tokens)
        return of_tokens.sum(1, dtype=torch.float64).cpu()

    total = 0.0
    of_windows = progress.track(in_batches(windows, batch_size, losses), "perplexity", "window", len(windows))
    try:
        with torch.inference_mode():
            for loss in of_windows:
                total += loss.item()
    except NotFiniteError as error:
        return {"value": None, "mean_nll": None, "not_finite": error.layer}
    predicted = windows[:, 1:].numel()
    mean = total / predicted
    value = math.exp(mean) if mean < math.log(sys.float_info.max) else sys.float_info.max
    return {"value": value, "mean_nll": mean, "predicted_tokens": predicted}
