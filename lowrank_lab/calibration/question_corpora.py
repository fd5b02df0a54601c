"""Questions, most of them about images: of a Python package, of the hub or its mirror.

A corpus has the two methods of those of texts: a hash of the content of a split, cheap and without torch, and what
is in it, here questions with the answers to choose from. No image is read before it is asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration import easy_vqa, jsonl
from lowrank_lab.calibration.image_corpora import opened
from lowrank_lab.models.hub import data_not_there, hub_commit

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What a model is asked, as it is written, and the answers that it chooses among.

    ``answer`` is the number of the right one, ``image`` the name of the image (None: there is none), and ``kind``
    that of the question, for numbers by kind.
    """

    text: str
    answers: tuple[str, ...]
    answer: int
    image: str | None
    kind: str


@dataclass(frozen=True)
class Questions:
    """``open(name)`` gives an image, a PIL image in RGB. ``missing`` are left out, as their images are not here."""

    rows: Sequence[Question]
    open: Callable[[str], Any]
    missing: int = 0

    def first(self, count: int | None) -> Questions:
        return replace(self, rows=self.rows[:count])

    def with_images(self, which: str, seed: int) -> Questions:
        """The same with their own images (``right``), those of others (``shuffled``), or without any (``none``)."""
        if which == "none":
            return replace(self, rows=[replace(row, image=None) for row in self.rows])
        if which == "right":
            return self
        images = sorted({row.image for row in self.rows if row.image is not None})
        other = dict(zip(images, _deranged(images, seed), strict=True))
        rows = [row if row.image is None else replace(row, image=other[row.image]) for row in self.rows]
        return replace(self, rows=rows)


class QuestionCorpus(Protocol):
    def content(self, split: str, data_root: str | None, store: Store) -> str:
        """A hash of the content of a split. Raises UserError, naming the file, where data is missing."""
        ...

    def questions(self, split: str, data_root: str | None) -> Questions: ...


class EasyVQA:
    """Questions about coloured shapes, with 13 answers, that the Python package easy-vqa ships with their images.

    ``instruction`` is a line after each question.
    """

    def __init__(self, instruction: str) -> None:
        checks.text(optional=True, instruction=instruction or None)
        self.instruction = instruction

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        if split not in easy_vqa.SPLITS:
            raise UserError(f"easy_vqa has no split '{split}'; choose {' or '.join(easy_vqa.SPLITS)}")
        file = self._file(f"{split}/questions.json")
        names = {row.image for row in self.questions(split, data_root).rows if row.image is not None}
        files = [*(self._image(file, name) for name in sorted(names)), self._file("answers.txt")]
        return fingerprint([self.instruction, store.file_hash(file), *(store.file_hash(one) for one in files)])

    def questions(self, split: str, data_root: str | None) -> Questions:
        file = self._file(f"{split}/questions.json")
        lines = self._file("answers.txt").read_text(encoding="utf-8").split("\n")
        answers = tuple(line.strip() for line in lines if line.strip())
        rows = [
            Question(
                _lines(text, self.instruction),
                answers,
                answers.index(answer),
                f"{image}.png",
                "yes or no" if answer in ("yes", "no") else "open",
            )
            for text, answer, image in json.loads(file.read_text(encoding="utf-8"))
        ]
        return Questions(rows, lambda name: opened(self._image(file, name)))

    @staticmethod
    def _image(questions: Path, name: str) -> Path:
        return questions.parent / "images" / name

    @staticmethod
    def _file(name: str) -> Path:
        return easy_vqa.folder() / name


class ScienceQA:
    """Questions with lettered answers and hints, half of them with an image: of the hub or a mirror.

    The mirror is ``<data_root>/<mirror>/<split>.jsonl``, where ``image`` is a path beside that file. It may say
    that a question has an image (``has_image``) which is not there: such a one is left out, and counted.

    only         ``images``: those with an image; ``texts``: the others; ``all``
    instruction  a line after each question
    """

    def __init__(self, mirror: str, hub: str, name: str | None, only: str, instruction: str) -> None:
        checks.text(mirror=mirror, hub=hub)
        checks.text(optional=True, name=name, instruction=instruction or None)
        checks.one_of(("images", "texts", "all"), only=only)
        self.mirror, self.hub, self.name = mirror, hub, name
        self.only, self.instruction = only, instruction

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        how = [self.only, self.instruction]
        if data_root is None:
            where = {"hub": self.hub, "name": self.name, "split": split, "how": how}
            return fingerprint({**where, "commit": self._commit()})
        file = self._mirror_file(split, data_root)
        if not file.is_file():
            raise UserError(
                f"data_root={data_root}: no file {file}; put the split there, choose another one "
                "(dataset.calibration.split=..., dataset.eval.split=...), or leave data_root out to use the hub"
            )
        names = sorted({row.image for row in self.questions(split, data_root).rows if row.image is not None})
        if absent := [name for name in names if not (file.parent / name).is_file()]:
            raise UserError(f"{file} names an image that is not there: {file.parent / absent[0]}")
        return fingerprint([how, store.file_hash(file), *(store.file_hash(file.parent / name) for name in names)])

    def questions(self, split: str, data_root: str | None) -> Questions:
        if data_root is None:
            return self._of_hub(split)
        file, rows, missing = self._mirror_file(split, data_root), [], 0
        for where, row in jsonl.rows(file):
            image = jsonl.field(row, "image", where)
            if image is None and row.get("has_image"):
                missing += self.only != "texts"
            elif self._wants(image is not None):
                rows.append(self._question(row, image, where))
        return Questions(rows, lambda name: opened(file.parent / name), missing)

    def _of_hub(self, split: str) -> Questions:
        from datasets import load_dataset

        try:
            table = load_dataset(self.hub, self.name, split=split, revision=self._commit())
        except UserError:
            raise
        except Exception as error:  # no network, a timeout, a proxy: the client raises many kinds
            raise self._not_there(error) from None
        rows = [
            self._question(
                row, str(number) if row["image"] is not None else None, f"data set {self.hub} row {number}"
            )
            for number, row in enumerate(table)
            if self._wants(row["image"] is not None)
        ]
        return Questions(rows, lambda name: table[int(name)]["image"].convert("RGB"))

    def _wants(self, has_image: bool) -> bool:
        return self.only == "all" or has_image == (self.only == "images")

    def _question(self, row: Mapping[str, Any], image: str | None, where: str) -> Question:
        """As LLaVA asks it: the hint, the question, the choices with letters, the instruction."""
        choices, answer = (jsonl.field(row, name, where) for name in ("choices", "answer"))
        if not (isinstance(choices, list) and 0 < len(choices) <= len(LETTERS) and checks.is_count(answer, 0)):
            raise UserError(f"{where}: choices must be a list of texts, and answer the number of the right one")
        if answer >= len(choices):
            raise UserError(f"{where}: answer {answer} is none of {len(choices)} choices, which count from 0")
        hint, text = (jsonl.text_field(row, name, where) for name in ("hint", "question"))
        letters = LETTERS[: len(choices)]
        lettered = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        context = f"Context: {hint}" if hint else ""
        kind = "text" if image is None else "image"
        return Question(_lines(context, text, *lettered, self.instruction), tuple(letters), answer, image, kind)

    def _mirror_file(self, split: str, data_root: str) -> Path:
        return Path(data_root) / self.mirror / f"{split}.jsonl"

    def _commit(self) -> str:
        try:
            return hub_commit("dataset", self.hub, None)
        except Exception as error:  # no network, a timeout, a proxy: the client raises many kinds
            raise self._not_there(error) from None

    def _not_there(self, error: Exception) -> UserError:
        return data_not_there(self.hub, error, f"{self.mirror}/<split>.jsonl")


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _deranged(names: Sequence[str], seed: int) -> Iterator[str]:
    """The names in an order in which none is at its own place, by ``seed``: each is followed by one of a cycle.

    Raises UserError for a single one, which no other can take the place of.
    """
    if len(names) == 1:
        raise UserError("there is one image alone: none can be shown in its place; leave images=shuffled out")
    cycle = list(names)
    random.Random(seed).shuffle(cycle)
    following = dict(zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    return (following[name] for name in names)
