"""lm-eval's tasks on a model in memory: progress, batches that fit, the first layer that is not finite."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.tokens import check_in_vocabulary
from lowrank_lab.evaluation.robust import NotFiniteError, check_output, in_batches
from lowrank_lab.evaluation.score_check import CheckScores
from lowrank_lab.process import progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LOGITS_BYTES = 2**30  # of a batch in float32; lm-eval's search begins with 64 sequences of full length
LARGEST_BATCH = 64


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    device: torch.device,
    task: str,
    manager: TaskManager,
    shots: int | None,
    limit: int | None,
    batch_size: int | Literal["auto"],
) -> dict[str, Any]:
    """``task`` on the first ``limit`` documents of each leaf, with ``shots`` examples (None: as the task has it).

    Returns ``results``, of the task and, for a group, of the groups and leaves within it, by name: ``metrics`` and
    ``stderr`` (None where there is none, or none that is finite), and of leaves the ``documents`` used and
    ``available``. ``groups`` has the names of the members of each group, ``truncated`` the count of requests longer
    than the model's context, whose beginnings were dropped, ``seeds`` and ``task_versions`` are lm-eval's. Where
    the logits are not finite there is only ``not_finite``, the first layer that has such an output.
    """
    with _only_evaluating():
        lm = InMemory(model.to(device), tokenizer, batch_size, task)
        try:
            found = lm_eval.simple_evaluate(
                lm, tasks=[task], num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
            )
        except NotFiniteError as error:
            return {"not_finite": error.layer}
        except AssertionError as error:  # lm-eval raises it where a task has fewer examples
            if "fewshot" not in str(error):
                raise
            raise UserError(f"eval: task {task} with shots={shots}: {error}".splitlines()[0]) from None
    documents = found["n-samples"]
    results = {}
    for name, numbers in found["results"].items():
        results[name] = _metrics(numbers)
        if name in documents:
            results[name] |= {"documents": documents[name]["effective"], "available": documents[name]["original"]}
    return {
        "results": results,
        "groups": found["group_subtasks"],
        "truncated": lm.truncated,
        "seeds": {name: seed for name, seed in found["config"].items() if name.endswith("_seed")},
        "task_versions": found["versions"],
    }


def _metrics(numbers: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as ``metrics`` and ``stderr`` by the metric's name."""
    metrics: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    for name, value in numbers.items():
        metric, comma, filtered = name.partition(",")
        if comma:
            of = metric.removesuffix("_stderr") + ("" if filtered == "none" else f",{filtered}")
            if metric.endswith("_stderr"):
                stderr[of] = None if value == "N/A" else _finite(value)
            else:
                metrics[of] = _finite(value)
    return {"metrics": metrics, "stderr": stderr}


def _finite(value: Any) -> float | None:
    """None for a number that is not finite, such as mc2 where every choice has probability zero."""
    return float(value) if math.isfinite(value) else None


class InMemory(HFLM):
    """lm-eval's model of transformers, on one that is loaded. It chooses its batches itself.

    batch_size  sequences at once; ``auto``: as many as have LOGITS_BYTES of logits, at most LARGEST_BATCH
    truncated   how many requests were longer than the model's context
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int | Literal["auto"], name: str) -> None:
        # A copy of the tokenizer: lm-eval sets its padding token.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal")
        self.fixed_batch_size = None if batch_size == "auto" else batch_size
        self.progress_name = name
        self.truncated = 0

    def tok_encode(self, *arguments: Any, **settings: Any) -> list[int]:
        """Raises UserError for a token that the model does not have."""
        ids = super().tok_encode(*arguments, **settings)
        if ids:
            check_in_vocabulary(max(ids), self.model.config.get_text_config())
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        self.batch_size_per_gpu = sys.maxsize  # all windows at once to _loglikelihood_tokens
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Requests (…, context, continuation), longest first; those with the same sequence share one forward."""

        def tokens(number: int) -> list[int]:
            return requests[number][1] + requests[number][2]

        def run(batch: list[list[int]]) -> list[list[tuple[float, bool]]]:
            self.batch_size_per_gpu = len(batch)
            numbers = [number for sequence in batch for number in sequence]
            answers = dict(zip(numbers, parent([requests[n] for n in numbers], disable_tqdm=True), strict=True))
            return [[answers[number] for number in sequence] for sequence in batch]

        parent = super()._loglikelihood_tokens
        order = sorted(range(len(requests)), key=lambda number: (-len(tokens(number)), tokens(number)))
        sequences = [list(same) for _, same in groupby(order, key=lambda number: tokens(number)[:-1])]
        self.truncated += sum(len(tokens(number)) > self.max_length + 1 for number in order)
        batches = in_batches(sequences, lambda first: self._at_once(len(tokens(first[0])) - 1), run)
        answers: dict[int, tuple[float, bool]] = {}
        tracked = progress.track(batches, self.progress_name, "sequence", len(sequences))
        for sequence, found in zip(sequences, tracked, strict=True):
            answers.update(zip(sequence, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Requests longest first."""

        def run(batch: list[int]) -> list[str]:
            self.batch_size_per_gpu = len(batch)
            return parent([requests[number] for number in batch], disable_tqdm=True)

        parent = super().generate_until
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        most = [request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests]
        self.truncated += sum(length > self.max_length - new for length, new in zip(lengths, most, strict=True))
        order = sorted(range(len(requests)), key=lambda number: -lengths[number])
        batches = in_batches(order, lambda first: self._at_once(lengths[first] + most[first]), run)
        tracked = progress.track(batches, self.progress_name, "text", len(order))
        texts = dict(zip(order, tracked, strict=True))
        return [texts[number] for number in range(len(requests))]

    def _at_once(self, length: int) -> int:
        if self.fixed_batch_size is not None:
            return self.fixed_batch_size
        vocabulary = self.model.config.get_text_config().vocab_size
        return max(1, min(LARGEST_BATCH, LOGITS_BYTES // (4 * vocabulary * min(length, self.max_length))))

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        logits = self.model(inps, use_cache=False).logits
        check_output(self.model, inps, torch.stack(logits.aminmax()))  # as finite as all, without a copy of them
        return logits

    @torch.inference_mode()
    def _model_generate(self, *arguments: Any, **settings: Any) -> Tensor:
        return super()._model_generate(*arguments, **settings, logits_processor=[CheckScores(self.model)])


@contextmanager
def _only_evaluating() -> Iterator[None]:
    """Without the progress bars and log lines of lm-eval and datasets, which would break those of this program.

    Also without lm-eval's inspection of the machine, which takes seconds a task.
    """
    logger, no_bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, tqdm, add_env_info = logger.level, lm_eval.api.task.tqdm, lm_eval.evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, *_, **__: items
    lm_eval.evaluator.add_env_info = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm, lm_eval.evaluator.add_env_info = tqdm, add_env_info
        if not no_bars:
            datasets.enable_progress_bars()
