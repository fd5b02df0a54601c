"""Image classification: a label for each image.

A batch has ``pixel_values`` (batch, channels, height, width), as the model's image processor makes them, and for a
loss ``labels`` (batch,) int64. Images of a batch have one size, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from lowrank_lab.models import load
from lowrank_lab.models.tasks.base import Batch, Reduction


class ImageClassification:
    """The ``Task`` of ``AutoModelForImageClassification``."""

    def load(self, location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
        return load.load_image_model(location, revision, dtype, trust_remote_code, AutoModelForImageClassification)

    def check(self, location: str, revision: str | None, trust_remote_code: bool) -> None:
        load.check_image_model(location, revision, trust_remote_code, AutoModelForImageClassification)

    def processor(self, location: str, revision: str | None, trust_remote_code: bool) -> Any:
        return load.load_image_processor(location, revision, trust_remote_code)

    def skeleton(self, model_config: Any, trust_remote_code: bool) -> nn.Module:
        return load.skeleton(model_config, trust_remote_code, AutoModelForImageClassification)

    def forward(self, model: nn.Module, batch: Batch) -> None:
        self.logits(model, batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits (batch, classes), float32. An image may have another size than the model's training had."""
        pixels = batch["pixel_values"].to(next(model.parameters()).dtype)
        resized = {"interpolate_pos_encoding": True} if _is_resized(model, pixels) else {}
        return model(pixel_values=pixels, **resized).logits.float()

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.logits(model, batch), batch["labels"]

    def loss(self, model: nn.Module, batch: Batch, reduction: Reduction = "mean") -> Tensor:
        """The cross-entropy of the labels, in nats, float32; with ``none`` (batch,)."""
        return cross_entropy(*self.predictions(model, batch), reduction=reduction)

    def predicted(self, batch: Batch) -> int:
        return len(batch["pixel_values"])

    def positions(self, skeleton: Callable[[], nn.Module], blocks: str, batch: Batch) -> int:
        """Patches, and tokens of the model's own: what a forward of one image without values has."""
        images, model = batch["pixel_values"], skeleton()
        found: list[int] = []
        hook = lambda _block, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"]).shape[1])
        model.get_submodule(f"{blocks}.0").register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            self.forward(model, {"pixel_values": torch.empty(1, *images.shape[1:], device="meta")})
        return found[0] * len(images)

    def rows(self, batch: Batch) -> Tensor | None:
        return None


def _is_resized(model: Any, pixels: Tensor) -> bool:
    """Whether images have another size than the positions of the model. DINOv2 interpolates these by itself."""
    config = getattr(model.config, "vision_config", model.config)
    return tuple(pixels.shape[-2:]) != _pair(config.image_size) and config.model_type != "dinov2"


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


IMAGE_CLASSIFICATION = ImageClassification()
