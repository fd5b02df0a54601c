"""Finds the first layer whose output is not finite while transformers generates text."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import LogitsProcessor

from lowrank_lab.evaluation.robust import check_output


class CheckScores(LogitsProcessor):
    """Checks the scores of every generated token and changes none. Raises NotFiniteError, naming the layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_output(self.model, input_ids, scores.amax(-1))  # -inf is how other processors forbid a token
        return scores
