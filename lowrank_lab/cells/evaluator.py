"""The interface of evaluators. No torch: cells ask for keys long before anything is measured."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.cells.config import for_key


class Evaluator:
    """Measures the model of a ``context``, a running.context.Context.

    What it returns is an artifact, found by the model, the settings and the text.

    A measurement is a dict with ``metric`` (the name of the number), ``value`` (a float; None where the model's
    logits are not finite, and ``not_finite`` names the first such layer; None where there is no number, for the
    ``reason`` given), ``protocol`` (how it was measured) and whatever else reports show.

    version             raise it when the evaluator gives another number for the same model
    component           the name of that version in versions.py, for those that are there
    reads_text          whether it reads a text: that of its ``dataset`` node, else that of the cell
    add_special_tokens  whether the text's tokens begin with the tokenizer's special ones
    of_this_machine     whether its number, and so its key, is of the machine and the process that ask for it
    no_influence        settings that change its speed but no number
    models              the kinds of model on which it measures anything (``Cell.kind``), None for all
    """

    version: int
    component = ""
    reads_text = False
    add_special_tokens = True
    of_this_machine = False
    no_influence: tuple[str, ...] = ("batch_size",)
    models: tuple[str, ...] | None = None

    def settings(self, node: DictConfig) -> Any:
        """What of its config ``node`` every number depends on."""
        return for_key(node, without=(*self.no_influence, "dataset"))

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        """What is measured separately, by name, each with what its number depends on besides ``settings``.

        Raises UserError where something that a part reads is not there.
        """
        return {"": None}

    def combination(self) -> Any:
        """What ``combine`` depends on besides the measured parts. It enters the record's key and no artifact's."""
        return None

    def lengths(self) -> dict[str, int]:
        """By the name of the setting, how many positions of the model it asks for."""
        seqlen = getattr(self, "seqlen", None)
        return {} if seqlen is None else {"seqlen": seqlen}

    def check(self, context: Any) -> None:
        """Look, before the model is read, whether this suits it.

        Raises SkippedCell, or UserError for a setting that no model of this kind could meet.
        """

    def __call__(self, context: Any, part: str) -> dict[str, Any]:
        """Measure one part of ``parts``."""
        raise NotImplementedError

    def combine(self, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One measurement from those of all parts."""
        return measured[""]
