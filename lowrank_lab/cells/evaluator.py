"""The interface of evaluators. No torch: cells need the keys of evaluators before anything is measured."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.cells.config import for_key
from lowrank_lab.models.vision_families import TEXT_TASK


class Evaluator:
    """Measures the model of a ``context``, a running.context.Context.

    Its result is an artifact, whose key depends on the model, the settings and the text.

    A measurement is a dict with ``metric`` (the name of the number), ``value`` (a float; None where the model's
    logits are not finite, with the first such place in ``not_finite``, or where there is no number, with a
    ``reason``), ``protocol`` (how it was measured) and other entries for reports.

    version             raise it when the evaluator gives another number for the same model
    component           the name of that version in versions.py, if it is there
    reads_text          whether it reads a data set: that of its ``dataset`` node, else that of the cell
    add_special_tokens  whether the text's tokens begin with the tokenizer's special ones
    of_this_machine     whether its number, and so its key, depends on the machine and the process that measure it
    no_influence        settings that change its speed but no number
    models              the kinds of model that it can measure (``Cell.kind``), None for all; cells of other kinds
                        leave it out
    model_tasks         the tasks (models/tasks/) whose models it can measure, in the same way
    """

    version: int
    component = ""
    reads_text = False
    add_special_tokens = True
    of_this_machine = False
    no_influence: tuple[str, ...] = ("batch_size",)
    models: tuple[str, ...] | None = None
    model_tasks: tuple[str, ...] = (TEXT_TASK,)

    def settings(self, node: DictConfig) -> Any:
        """The settings of its config ``node`` that every number depends on."""
        return for_key(node, without=(*self.no_influence, "dataset"))

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        """The parts that are measured and kept separately, by name.

        The value is what the part's number depends on in addition to ``settings``.

        Raises UserError where data that a part reads is missing.
        """
        return {"": None}

    def combination(self) -> Any:
        """What ``combine`` depends on in addition to the parts. Only the key of the record has it."""
        return None

    def lengths(self) -> dict[str, int]:
        """By the name of the setting, how many positions of the model it needs."""
        seqlen = getattr(self, "seqlen", None)
        return {} if seqlen is None else {"seqlen": seqlen}

    def read(self, context: Any) -> None:
        """Read its data set as far as that shows, before any compression, whether it can be read."""
        context.make_text_tokens()

    def check(self, context: Any) -> None:
        """Check, before the weights are read, whether this can measure the model.

        Raises SkippedCell, or UserError for a setting that is wrong for every model of this kind.
        """

    def __call__(self, context: Any, part: str) -> dict[str, Any]:
        """Measure one part of ``parts``."""
        raise NotImplementedError

    def combine(self, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The measurement from those of all parts."""
        return measured[""]
