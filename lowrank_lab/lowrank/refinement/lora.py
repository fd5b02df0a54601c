"""Sequential low-rank fine-tuning (SVD-LLM, papers/001): first of all left factors, then of all right ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab import checks
from lowrank_lab.modules.site import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Lora:
    """peft's LoRA on the left factors, trained and merged, then on the right ones. The ranks stay what they are.

    r, alpha, dropout  of LoRA
    learning_rate, epochs, batch_size, warmup (steps), max_norm (of the gradient; null for any)
                       of each of the two phases: AdamW, rising linearly for ``warmup`` and falling to 0
    micro_batch        sequences a forward; changes speed and memory, and which activations dropout takes
    seed               of the windows, their order, LoRA's initial values and dropout

    The other settings are the windows of text (``context.text_ids``). The loss is that of the next token, every
    token counts, and training is in float32.
    """

    needs_calibration = False

    def __init__(
        self,
        r: int,
        alpha: float,
        dropout: float,
        learning_rate: float,
        epochs: int,
        batch_size: int,
        micro_batch: int,
        warmup: int,
        max_norm: float | None,
        seed: int,
        **windows: Any,
    ) -> None:
        checks.whole(1, r=r, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch)
        checks.whole(0, warmup=warmup)
        checks.above(0, alpha=alpha, learning_rate=learning_rate)
        checks.above(0, optional=True, max_norm=max_norm)
        if not checks.is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not valid; it must be a number in [0, 1)")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.warmup = warmup
        self.max_norm = max_norm
        self.seed = seed

    def prepare(self, context: Context) -> None:
        context.text_ids("refinement")

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        from lowrank_lab.lowrank.refinement.lora_training import refine

        refine(context, ranks, folder, self)
