"""Images a second and memory of an image classifier, against the dense model in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.models.vision_families import IMAGE_TASK
from lowrank_lab.process import environment, progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.calibration import images
    from lowrank_lab.evaluation import timing
    from lowrank_lab.models.tasks import image_classification
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    images = LazyModule("lowrank_lab.calibration.images")
    timing = LazyModule("lowrank_lab.evaluation.timing")
    image_classification = LazyModule("lowrank_lab.models.tasks.image_classification")


class ImageSpeed(Evaluator):
    """Forwards of batches of one image, which compressed and dense model take in turns. It is prepared already.

    batch_sizes      images a forward; the value is of the first
    repeats, warmup  measured forwards of each model and batch size, and unmeasured ones before them

    The number depends on the machine, which is part of its key.
    """

    version = versions.IMAGE_SPEED
    component = "IMAGE_SPEED"
    model_tasks = (IMAGE_TASK,)
    of_this_machine = True

    def __init__(self, batch_sizes: Sequence[int], repeats: int, warmup: int) -> None:
        if not isinstance(batch_sizes, list) or not all(checks.is_count(size, 1) for size in batch_sizes or [0]):
            raise ValueError(f"batch_sizes={batch_sizes} is not valid; it must be a list of whole numbers from 1")
        checks.whole(1, repeats=repeats, warmup=warmup)
        self.batch_sizes = batch_sizes
        self.repeats = repeats
        self.warmup = warmup

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        return {"": environment.machine_with(cfg.device)}

    def check(self, context: Context) -> None:
        if context.cell.saved is not None and context.cell.saved.online:
            raise SkippedCell(
                "eval=image_speed compares with a dense model; this checkpoint cannot be converted to one"
            )

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the median speed-up in the first batch size, all ``settings``, and the protocol."""
        models = {"model": context.model}
        if context.cell.kind != "dense":
            models = {"dense": context.dense_model(), **models}
        conditions = timing.conditions()
        image = images.pixel_values(context.processor, [context.evaluation_images().open(0)])
        with torch.no_grad():
            compared = [
                self._compare(models, image.repeat(size, 1, 1, 1), context.device)
                for size in progress.track(self.batch_sizes, "image speed", "batch size")
            ]
        first = compared[0]
        speeds = {name: first[name] and first[name]["images_per_second"] for name in models}
        return {
            "metric": "image speed",
            "value": first["ratio"] and first["ratio"]["median"],
            "images_per_second": speeds["model"],
            "dense_images_per_second": speeds.get("dense", speeds["model"]),
            "settings": compared,
            "protocol": {
                **conditions,
                **environment.machine(),
                "device": context.device.type,
                "gpu": environment.hardware(context.device).get("gpu"),
                "dtype": context.cell.cfg.dtype,
                "pixels": list(image.shape[1:]),
                "batch_sizes": list(self.batch_sizes),
                "repeats": self.repeats,
                "warmup": self.warmup,
            },
        }

    def _compare(self, models: timing.Models, batch: Tensor, device: torch.device) -> dict[str, Any]:
        """All that is measured in one batch size.

        model, dense   ``images_per_second``, and ``memory_bytes``, the peak on top of the weights; None where it
                       does not fit
        ratio          median and quartiles of the speed-up over the dense model (over itself where there is none)
        """
        batch = batch.to(device)
        forward = lambda model: image_classification.IMAGE_CLASSIFICATION.forward(model, {"pixel_values": batch})

        def memory(model: nn.Module) -> dict[str, Any]:
            return {"memory_bytes": environment.memory_on_top(lambda: forward(model), device)}

        found = {name: one for name in models if (one := timing.alone(models, name, device, memory)) is not None}
        run = lambda model: {"forward": timing.timed(lambda: forward(model), device)[1]}
        seconds = timing.alternate(models, list(found), run, self.repeats, self.warmup, device)
        for name, of_model in seconds.items():
            found[name]["images_per_second"] = len(batch) / float(np.median(of_model["forward"]))
        reference = "dense" if "dense" in models else "model"
        both = {"model", reference} <= set(found)
        of_both = [seconds[name]["forward"] for name in (reference, "model")] if both else None
        ratio = timing.spread(*of_both) if of_both else None
        return {"batch_size": len(batch), **{name: found.get(name) for name in models}, "ratio": ratio}
