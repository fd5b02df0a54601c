"""Small images with labels for tests."""

from __future__ import annotations

import json
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


def science_qa(root: Path, train: int = 16, test: int = 8) -> Path:
    """A mirror of ScienceQA with images of noise: every fourth question has none, and one has it elsewhere."""
    from PIL import Image

    generator, folder = random.Random(0), root / "derek-thomas/ScienceQA/default"
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        rows = []
        for number in range(count):
            image = None if number % 4 == 3 else f"images/{split}{number}.png"
            if image is not None:
                pixels = bytes(generator.randrange(256) for _ in range(3 * 20 * 16))
                Image.frombytes("RGB", (20, 16), pixels).save(folder / image)
            row = {"image": image, "question": f"Which is {number}?", "hint": "Look." if number % 2 else ""}
            row |= {"choices": ["one", "two", "three"][: 2 + number % 2], "answer": number % 2}
            rows.append({**row, "has_image": image is not None or number == 3})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def vlm_words(root: Path) -> list[str]:
    """The words of a command line for a tiny model of images and text on such questions in ``root``."""
    if not root.exists():
        science_qa(root)
    data = ["dataset=scienceqa", f"data_root={root}", "calibration.samples=10"]
    return ["model.path=tiny:llava", *data, "eval=[ppl,scienceqa]"]  # ppl is left out
