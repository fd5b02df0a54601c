"""From images to the pixel values that a model takes, and to calibration samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.calibration.corpora import Part
from lowrank_lab.calibration.image_corpora import ImageCorpus, LabelledImages
from lowrank_lab.models.tasks.base import Batch

# What a protocol says of an image processor, where it has it.
SETTINGS = ("size", "crop_size", "resample", "do_center_crop", "do_normalize", "image_mean", "image_std")


def images_of(corpus: ImageCorpus, part: Part, data_root: str | None) -> LabelledImages:
    """The images of a part of a data set."""
    return corpus.images(part.split, data_root).first(part.max_documents)


def pixel_values(processor: Any, images: Sequence[Any]) -> Tensor:
    """(images, channels, height, width), float32, as the model's image processor makes them of PIL images."""
    return processor(images=list(images), return_tensors="pt")["pixel_values"]


def blank() -> Image.Image:
    """A black image, square."""
    return Image.new("RGB", (64, 64))


def settings_of(processor: Any) -> dict[str, Any]:
    """How a processor prepares images, as plain data for the protocol."""
    described = json.loads(processor.to_json_string())
    found = {name: described[name] for name in SETTINGS if described.get(name) is not None}
    return {"class": type(processor).__name__, **found}


def chosen_samples(count: int, samples: int, seed: int) -> np.ndarray:
    """The numbers of ``samples`` images among ``count``, each once. Raises SkippedCell where there are too few."""
    if count < samples:
        raise SkippedCell(
            f"the calibration part has {count} images, fewer than calibration.samples={samples}; take fewer"
        )
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)[:samples]


def make_samples(
    folder: Path, processor: Any, corpus: ImageCorpus, part: Part, data_root: str | None, samples: int, seed: int
) -> None:
    """The artifact of a calibration set: ``pixel_values`` and ``labels`` of images drawn without replacement."""
    found = images_of(corpus, part, data_root)
    numbers = chosen_samples(len(found.labels), samples, seed)
    pixels = pixel_values(processor, [found.open(int(number)) for number in numbers])
    labels = torch.tensor([found.labels[int(number)] for number in numbers])
    save_file({"pixel_values": pixels.contiguous(), "labels": labels}, folder / "images.safetensors")
    facts = {
        "split": part.split,
        "images": samples,
        "images_available": len(found.labels),
        "classes": max(found.labels) + 1,
        "processor": settings_of(processor),
        "sha256": hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
    }
    (folder / "images.json").write_text(json.dumps(facts, indent=1))


def load_samples(folder: Path) -> tuple[Batch, dict[str, Any]]:
    """The samples as one batch, and the facts about them that go into the record."""
    return load_file(folder / "images.safetensors"), json.loads((folder / "images.json").read_text())


def check_labels(classes: int, model_config: Any) -> None:
    """Raise UserError where a model does not have so many classes."""
    if classes > model_config.num_labels:
        raise UserError(
            f"the data set has {classes} classes and the model {model_config.num_labels}; choose the data set that "
            "its classifier was trained on"
        )
