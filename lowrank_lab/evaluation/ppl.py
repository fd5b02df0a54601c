"""The ``eval=ppl`` evaluator: its protocol as data. perplexity.py, which needs torch, computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.cells import versions
from lowrank_lab.evaluation.windows import WindowEvaluator

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Perplexity(WindowEvaluator):
    """Perplexity on a text."""

    version = versions.PERPLEXITY
    component = "PERPLEXITY"

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value and its protocol."""
        from lowrank_lab.evaluation.perplexity import perplexity

        windows, protocol = self.windows(context)
        measured = perplexity(context.model, windows, self.batch_size, context.device)
        return {"metric": "perplexity", **measured, "protocol": {**protocol, "loss": "token mean, float32"}}
