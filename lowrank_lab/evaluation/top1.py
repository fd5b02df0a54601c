"""How many images a model puts into the right class: top-1 and top-5."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.robust import NotFiniteError, first_not_finite, in_batches
from lowrank_lab.models.vision_families import IMAGE_TASK
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.calibration import images
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks import image_classification
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    images = LazyModule("lowrank_lab.calibration.images")
    walk = LazyModule("lowrank_lab.models.walk")
    image_classification = LazyModule("lowrank_lab.models.tasks.image_classification")

FIRST = 5


class Top1(Evaluator):
    """Top-1 accuracy, and with it top-5 and the mean cross-entropy of the labels.

    max_images  only the first so many of the data set's evaluation part, or None for all
    batch_size  images a forward
    dataset     the images, where they are not those of the cell; read by the cell
    """

    version = versions.TOP1
    component = "TOP1"
    model_tasks = (IMAGE_TASK,)
    reads_text = True

    def __init__(self, max_images: int | None, batch_size: int, dataset: dict[str, Any] | None = None) -> None:
        checks.whole(1, batch_size=batch_size)
        checks.whole(1, optional=True, max_images=max_images)
        self.max_images = max_images
        self.batch_size = batch_size

    def read(self, context: Context) -> None:
        """Raises UserError where the images are not there, or the model has not so many classes."""
        found = context.evaluation_images()
        images.check_labels(max(found.labels) + 1, context.model_config)
        found.open(0)

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, ``top5``, ``mean_nll`` in nats, the standard error, and the protocol."""
        available = context.evaluation_images()
        found = available.first(self.max_images)
        model, device, digest = context.model.to(context.device), context.device, hashlib.sha256()
        task = image_classification.IMAGE_CLASSIFICATION

        def measured(numbers: range) -> list[tuple[bool, bool, float, bytes]]:
            opened = [found.open(number) for number in numbers]
            labels = torch.tensor([found.labels[number] for number in numbers], device=device)
            batch = {"pixel_values": images.pixel_values(context.processor, opened).to(device)}
            logits = task.logits(model, batch)
            if not torch.isfinite(logits).all():
                raise NotFiniteError(first_not_finite(model, lambda: task.forward(model, batch)) or "the model")
            return [(*one, image.tobytes()) for one, image in zip(_scores(logits, labels), opened, strict=True)]

        count = len(found.labels)
        top1 = top5 = 0
        nll = 0.0
        try:
            with torch.inference_mode():
                of_images = in_batches(range(count), self.batch_size, measured)
                for number, one in enumerate(progress.track(of_images, "top-1", "image", count)):
                    top1, top5, nll = top1 + one[0], top5 + one[1], nll + one[2]
                    digest.update(one[3] + str(found.labels[number]).encode())
        except NotFiniteError as error:
            return {"metric": "top-1", "value": None, "not_finite": error.layer, "protocol": {}}
        share = top1 / count
        return {
            "metric": "top-1",
            "value": share,
            "stderr": math.sqrt(share * (1 - share) / count),
            "top5": top5 / count,
            "mean_nll": nll / count,
            "protocol": {
                "split": context.cell.text_of(context.evaluator).eval.split,
                "images": count,
                "images_available": len(available.labels),
                "sha256": digest.hexdigest(),
                "classes": context.model_config.num_labels,
                "processor": images.settings_of(context.processor),
            },
        }


def _scores(logits: Tensor, labels: Tensor) -> list[tuple[bool, bool, float]]:
    """By image: whether its label has the highest logit, one of the five highest, and its cross-entropy in nats.

    Of equal logits the other class is taken for the higher one: a model that says nothing has nothing right.
    """
    own = logits.gather(1, labels[:, None])
    before = (logits >= own).sum(1) - 1
    nll = torch.logsumexp(logits, 1) - own[:, 0]
    few = min(FIRST, logits.shape[1])
    return [(bool(b == 0), bool(b < few), float(n)) for b, n in zip(before.tolist(), nll.tolist(), strict=True)]
