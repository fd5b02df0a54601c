"""The images and questions of easy-VQA (Victor Zhou, 2019), which the Python package easy-vqa ships. No torch.

4,000 images of 64 × 64 pixels with one shape for training and 1,000 for tests, about ten questions each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lowrank_lab.basics import packages
from lowrank_lab.basics.errors import UserError

PACKAGE = "easy-vqa"
SPLITS = ("train", "test")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    image: int
    text: str
    answer: str

    @property
    def is_open(self) -> bool:
        """Whether the answer is a colour or a shape, not yes or no."""
        return self.answer not in YES_NO


def answers() -> list[str]:
    """All answers there are, sorted. Raises UserError where the package is absent."""
    return sorted((folder() / "answers.txt").read_text(encoding="utf-8").split())


def questions(split: str) -> list[Question]:
    """All questions of a split, by image. Raises UserError where the package is absent."""
    read = json.loads((folder() / split / "questions.json").read_text(encoding="utf-8"))
    return sorted((Question(image, text, answer) for text, answer, image in read), key=lambda q: q.image)


def image_file(split: str, image: int) -> Path:
    """The file of an image."""
    return folder() / split / "images" / f"{image}.png"


def folder() -> Path:
    """That of the package's data. Raises UserError where the package is absent."""
    if (file := packages.file_of(PACKAGE, "answers.txt")) is not None:
        return file.parent
    raise UserError(
        f"easy-VQA is read from the Python package {PACKAGE}, which is not installed; "
        f"run: pip install --no-deps {PACKAGE}"
    )
