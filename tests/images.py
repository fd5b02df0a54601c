"""Small images with labels for tests."""

from __future__ import annotations

import random
from pathlib import Path

CLASSES = 10


def image_folder(root: Path, train: int = 8, test: int = 4) -> Path:
    """Images of noise in ``<root>/<split>/<class>/``, so many of each class."""
    from PIL import Image

    generator = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = bytes(generator.randrange(256) for _ in range(3 * 20 * 16))
                Image.frombytes("RGB", (20, 16), pixels).save(folder / f"{number}.png")
    return root


def vision_words(family: str, folder: Path) -> list[str]:
    """The words of a command line for a tiny image classifier on such images below ``folder``."""
    images = folder / "images"
    if not images.exists():
        image_folder(images)
    data = ["dataset=image_folder", f"dataset.corpus.folder={images}"]
    return [f"model.path=tiny:{family}", *data, "eval=[ppl,top1]", "calibration.samples=40"]  # ppl is left out
