"""Models of images and text: each token of an answer is predicted from images, question and the tokens before it.

A batch has ``input_ids`` (samples, length) int64, in which a token stands for each feature of an image,
``attention_mask`` (samples, length), 0 at padding, and ``labels`` (samples, length), -100 at all that is no answer.
By sample it has the number of its ``images`` (samples,) int64, and what the model's processor made of them:
``pixel_values`` (samples, images, …), which are 0 where a sample has fewer images than another, and other such
tensors (``OF_IMAGES``). So a batch can be cut by sample, whatever number of images each has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForImageTextToText
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import load
from lowrank_lab.models.tasks.base import Batch, Reduction
from lowrank_lab.models.tasks.causal_lm import NOT_PREDICTED, targets_of
from lowrank_lab.models.vision_families import row_of

OF_IMAGES = ("pixel_values", "image_sizes", "pixel_attention_mask")
IMAGES_BY_SAMPLE = ("idefics3", "smolvlm")  # the model takes (samples, images, …) and finds the empty images itself


class ImageText:
    """The ``Task`` of ``AutoModelForImageTextToText``; positions and rows are those of its language model."""

    def load(self, location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
        return load.load_image_model(location, revision, dtype, trust_remote_code, AutoModelForImageTextToText)

    def check(self, location: str, revision: str | None, trust_remote_code: bool) -> None:
        load.check_image_text_model(location, revision, trust_remote_code, AutoModelForImageTextToText)

    def processor(self, location: str, revision: str | None, trust_remote_code: bool) -> Any:
        return load.load_processor(location, revision, trust_remote_code)

    def skeleton(self, model_config: Any, trust_remote_code: bool) -> nn.Module:
        return load.skeleton(model_config, trust_remote_code, AutoModelForImageTextToText)

    def forward(self, model: nn.Module, batch: Batch) -> None:
        body = getattr(model, str(model.base_model_prefix))
        body(**inputs_of(model, batch), use_cache=False)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits (samples, length, vocabulary), float32."""
        return model(**inputs_of(model, batch), use_cache=False).logits.float()

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of the tokens of answers, of all samples one after the other."""
        targets = targets_of(batch)
        predicted = targets != NOT_PREDICTED
        return self.logits(model, batch)[:, :-1][predicted], targets[predicted]

    def loss(self, model: nn.Module, batch: Batch, reduction: Reduction = "mean") -> Tensor:
        """The negative log-likelihood of the tokens of answers, in nats, float32.

        With ``none`` it is (samples, length - 1), 0 where a token is not predicted.
        """
        logits, targets = self.logits(model, batch)[:, :-1], targets_of(batch)
        losses = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=NOT_PREDICTED
        )
        return losses.view(targets.shape) if reduction == "none" else losses

    def predicted(self, batch: Batch) -> int:
        return int((targets_of(batch) != NOT_PREDICTED).sum())

    def positions(self, skeleton: Callable[[], nn.Module], blocks: str, batch: Batch) -> int:
        """Tokens of texts and images, padding too."""
        return batch["input_ids"].numel()

    def rows(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()


class ImagesOfText(ImageText):
    """The same, with the positions of its image encoder, where nothing is padded."""

    def forward(self, model: nn.Module, batch: Batch) -> None:
        """Raises UserError for a batch without images, which does not reach the encoder."""
        if not batch["images"].any():
            raise UserError(
                "targets.tower=vision: a batch of the calibration has no image; choose a data set with images"
            )
        super().forward(model, batch)

    def positions(self, skeleton: Callable[[], nn.Module], blocks: str, batch: Batch) -> int:
        """Patches, and tokens of the encoder's own, of all images and of all tiles of them."""
        config: Any = skeleton().config
        family = row_of(config)
        assert family is not None
        height, width = (size // config.vision_config.patch_size for size in batch["pixel_values"].shape[-2:])
        return (height * width + family.towers["vision"].own_tokens) * _tiles(config, batch)

    def rows(self, batch: Batch) -> Tensor | None:
        return None


IMAGE_TEXT, IMAGES_OF_TEXT = ImageText(), ImagesOfText()


def _tiles(config: Any, batch: Batch) -> int:
    """How many images the encoder is given for a batch: LLaVA-Next cuts one into tiles, by its size."""
    images = int(batch["images"].sum())
    if "image_sizes" not in batch:
        return images
    is_there = torch.arange(batch["image_sizes"].shape[1]) < batch["images"][:, None]
    size = config.vision_config.image_size
    tiles = [
        image_size_to_num_patches(one, config.image_grid_pinpoints, size) for one in batch["image_sizes"][is_there]
    ]
    return sum(tiles)


def inputs_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What ``model`` is called with for a batch: of the images those that there are, in its dtype."""
    found = {name: batch[name] for name in ("input_ids", "attention_mask")}
    counts = batch.get("images")
    if counts is None or not counts.any():
        return found
    by_sample = model.config.model_type in IMAGES_BY_SAMPLE
    for name in OF_IMAGES:
        if (tensor := batch.get(name)) is not None:
            is_there = torch.arange(tensor.shape[1], device=tensor.device) < counts[:, None]
            found[name] = tensor if by_sample else tensor[is_there]
    found["pixel_values"] = found["pixel_values"].to(model.dtype)
    return found


def sample_of(processed: Batch, answer: Sequence[int] = ()) -> Batch:
    """A batch of one, of what a processor made of one text with its images, and the tokens of an ``answer``."""
    ids = torch.cat([processed["input_ids"], torch.tensor([list(answer)], dtype=torch.long)], 1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - len(answer)] = NOT_PREDICTED
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tensors = {name: processed[name] for name in OF_IMAGES if name in processed}
    # Idefics3's processor gives (samples, images, …), the others (images, …); a sample is (1, images, …).
    tiled = "pixel_values" in tensors and tensors["pixel_values"].ndim == 5 and "image_sizes" not in tensors
    tensors = {name: tensor if tiled else tensor[None] for name, tensor in tensors.items()}
    count = tensors["pixel_values"].shape[1] if tensors else 0
    return {**sample, "images": torch.tensor([count]), **tensors}


def joined(samples: Sequence[Batch], pad_token: int = 0, side: str = "right") -> Batch:
    """Samples as one batch: shorter ones are padded on a ``side``, and those with fewer or smaller images by 0."""
    fill = {"input_ids": pad_token, "labels": NOT_PREDICTED}
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        known = [sample[name] for sample in samples if name in sample]
        blank = known[0].new_zeros((1, *[0] * (known[0].ndim - 1)))
        tensors = [sample.get(name, blank) for sample in samples]
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        at = side if name not in OF_IMAGES else "right"
        found[name] = torch.cat([_padded(tensor, shape, fill.get(name, 0), at) for tensor in tensors])
    return found


def _padded(tensor: Tensor, shape: Sequence[int], value: int, side: str) -> Tensor:
    """A tensor (samples, …) enlarged to (samples, *shape)."""
    widths: list[int] = []
    for size, wanted in zip(reversed(tensor.shape[1:]), reversed(shape), strict=True):
        widths += [0, wanted - size] if side == "right" else [wanted - size, 0]
    return pad(tensor, widths, value=value)
