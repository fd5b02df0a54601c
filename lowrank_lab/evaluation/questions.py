"""How many questions about images a model answers rightly, and how many without looking: with others, with none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.robust import NotFiniteError, in_batches
from lowrank_lab.models.vision_families import IMAGE_TEXT_TASK
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch

    from lowrank_lab.calibration import image_texts
    from lowrank_lab.evaluation import answering
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    image_texts = LazyModule("lowrank_lab.calibration.image_texts")
    answering = LazyModule("lowrank_lab.evaluation.answering")

IMAGES = ("right", "shuffled", "none")
SEED = 0  # of shuffled images


class QuestionAccuracy(Evaluator):
    """The share of questions that are answered rightly, by ``likelihood`` or by ``generation``.

    by              ``likelihood``: of the answers to choose from, that whose tokens are the likeliest after the
                    question (their log-likelihoods are summed); ``generation``: what is written, greedily, as
                    LLaVA's own evaluation reads it
    images          measured with the ``right`` images, with ``shuffled`` ones and with ``none``, each by itself; a
                    model that does not look has the same with all three. The value is of the first
    max_questions   only the first so many of the data set's evaluation part, or None for all
    max_new_tokens  of an answer that is written
    batch_size      questions a forward
    dataset         the questions, where they are not those of the cell; read by the cell
    """

    version = versions.QUESTIONS
    component = "QUESTIONS"
    model_tasks = (IMAGE_TEXT_TASK,)
    reads_text = True
    no_influence = ("batch_size", "images")

    def __init__(
        self,
        by: str,
        images: Sequence[str],
        max_questions: int | None,
        max_new_tokens: int,
        batch_size: int,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        checks.one_of(("likelihood", "generation"), by=by)
        if not isinstance(images, list) or not images:
            raise ValueError(f"images={images} is not valid; it must be a list of {', '.join(IMAGES)}")
        for one in images:
            checks.one_of(IMAGES, images=one)
        checks.whole(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
        checks.whole(1, optional=True, max_questions=max_questions)
        self.by = by
        self.images = images
        self.max_questions = max_questions
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        return {images: images for images in self.images}

    def combination(self) -> Any:
        return self.images

    def read(self, context: Context) -> None:
        """Raises UserError where the questions are not there, or an image cannot be read."""
        found = context.evaluation_questions().first(self.max_questions)
        if not found.rows:
            raise UserError(f"eval.{context.evaluator}: its data set has no question whose image is here")
        for row in found.rows[:1]:
            image_texts.asked(context.processor, row, None if row.image is None else found.open(row.image))

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it with the images of ``part``: the share, its standard error, by ``kinds``, and the protocol."""
        available = context.evaluation_questions()
        found = available.first(self.max_questions).with_images(part, SEED)
        processor, rows = context.processor, found.rows
        context.model.to(context.device)

        def measured(numbers: range) -> list[tuple[bool, float | None]]:
            asked = []
            for number in numbers:
                name = rows[number].image
                asked.append(image_texts.asked(processor, rows[number], None if name is None else found.open(name)))
            of_numbers = [rows[number] for number in numbers]
            if self.by == "generation":
                return answering.by_generation(context, of_numbers, asked, self.max_new_tokens)
            return answering.by_likelihood(context, of_numbers, asked)

        right: list[bool] = []
        losses: list[float | None] = []
        try:
            with torch.inference_mode():
                of_questions = in_batches(range(len(rows)), self.batch_size, measured)
                for is_right, loss in progress.track(
                    of_questions, f"questions, images {part}", "question", len(rows)
                ):
                    right.append(is_right)
                    losses.append(loss)
        except NotFiniteError as error:
            return {"metric": "question accuracy", "value": None, "not_finite": error.layer, "protocol": {}}
        kinds: dict[str, list[bool]] = defaultdict(list)
        for row, is_right in zip(rows, right, strict=True):
            kinds[row.kind].append(is_right)
        known = [loss for loss in losses if loss is not None]
        return {
            "metric": "question accuracy",
            **_share(right),
            "mean_nll": sum(known) / len(known) if known else None,
            "kinds": {kind: _share(of_kind) for kind, of_kind in sorted(kinds.items())},
            "protocol": {
                "split": context.cell.text_of(context.evaluator).eval.split,
                "questions": len(rows),
                "questions_available": len(available.rows),
                "questions_missing": available.missing,
                "sha256": image_texts.digest_of(available.first(self.max_questions)),
                "by": self.by,
                **({"max_new_tokens": self.max_new_tokens} if self.by == "generation" else {}),
                "prompt": image_texts.prompt_of(processor, available.rows[0]),
                "processor": image_texts.image_settings(processor),
            },
        }

    def combine(self, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The measurement with the first kind of images, and the shares with all of them."""
        first = measured[self.images[0]]
        shares = {which: {name: one.get(name) for name in ("value", "stderr")} for which, one in measured.items()}
        return {**first, "images": shares, "protocol": {**first["protocol"], "images": self.images[0]}}


def _share(right: Sequence[bool]) -> dict[str, Any]:
    share = sum(right) / len(right)
    return {"value": share, "stderr": math.sqrt(share * (1 - share) / len(right)), "count": len(right)}
