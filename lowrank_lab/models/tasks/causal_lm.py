"""Causal language models: each token is predicted from those before it.

A batch has ``input_ids`` (batch, length) int64. It may have an ``attention_mask`` (batch, length), 0 at padding on
either side, and ``labels`` (batch, length), -100 at tokens that are not predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank_lab.models import load
from lowrank_lab.models.tasks.base import Batch, Reduction

NOT_PREDICTED = -100  # as in transformers


class CausalLM:
    """The ``Task`` of ``AutoModelForCausalLM``."""

    def load(self, location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
        return load.load_model(location, revision, dtype, trust_remote_code)

    def check(self, location: str, revision: str | None, trust_remote_code: bool) -> None:
        load.check_model(location, revision, trust_remote_code)

    def processor(self, location: str, revision: str | None, trust_remote_code: bool) -> Any:
        return load.load_tokenizer(location, revision, trust_remote_code)

    def skeleton(self, model_config: Any, trust_remote_code: bool) -> nn.Module:
        return load.skeleton(model_config, trust_remote_code)

    def forward(self, model: nn.Module, batch: Batch) -> None:
        backbone = getattr(model, str(model.base_model_prefix))
        backbone(batch["input_ids"], **_others(batch), use_cache=False)

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of the tokens that are predicted, of all sequences one after the other."""
        targets = targets_of(batch)
        predicted = targets != NOT_PREDICTED
        return _logits(model, batch)[predicted].float(), targets[predicted]

    def loss(self, model: nn.Module, batch: Batch, reduction: Reduction = "mean") -> Tensor:
        """The negative log-likelihood of the tokens, in nats, float32.

        With ``none`` it is (batch, length - 1), 0 where a token is not predicted.
        """
        logits, targets = _logits(model, batch).float(), targets_of(batch)
        losses = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=NOT_PREDICTED
        )
        return losses.view(targets.shape) if reduction == "none" else losses

    def predicted(self, batch: Batch) -> int:
        targets = targets_of(batch)
        return int((targets != NOT_PREDICTED).sum())

    def positions(self, skeleton: Callable[[], nn.Module], blocks: str, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def rows(self, batch: Batch) -> Tensor | None:
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()


CAUSAL_LM = CausalLM()


def of_tokens(tokens: Tensor) -> Batch:
    """The batch of sequences without padding: ``tokens`` (batch, length) int64."""
    return {"input_ids": tokens}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (batch, length - 1, tokens) of every token but the first."""
    logits: Tensor = model(batch["input_ids"], **_others(batch), use_cache=False).logits
    return logits[:, :-1]


def _others(batch: Batch) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in ("input_ids", "labels")}


def targets_of(batch: Batch) -> Tensor:
    """The token (batch, length - 1) that each position predicts; NOT_PREDICTED after, before and at padding."""
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    if (mask := batch.get("attention_mask")) is not None:
        targets = targets.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), NOT_PREDICTED)
    return targets
