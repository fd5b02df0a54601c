"""Text corpora: the embedded Wikipedia articles, and data sets from the hub or from a local mirror of it.

A corpus has two methods: a hash of the content of a split (cheap, without torch, for keys), and its documents.
Conventions of the papers (split, join string) are data in ``conf/dataset/``.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics import checks, packages
from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration import jsonl
from lowrank_lab.models.hub import data_not_there, hub_commit


@dataclass(frozen=True)
class Part:
    """Which documents of a corpus make a text, and how they are joined into one string."""

    split: str
    join: str
    max_documents: int | None


class Corpus(Protocol):
    def content(self, split: str, data_root: str | None, store: Store) -> str:
        """A hash of the content of a split. Raises UserError where the data is missing."""
        ...

    def documents(self, split: str, data_root: str | None) -> Iterator[str]: ...


def text_of(corpus: Corpus, part: Part, data_root: str | None) -> tuple[str, int]:
    """The text of a part as one string, and how many documents it joins."""
    documents = list(islice(corpus.documents(part.split, data_root), part.max_documents))
    return part.join.join(documents), len(documents)


class EmbeddedWikipedia:
    """About 105 real Wikipedia articles that the Python package gensim ships for its own tests.

    Every fifth article is ``test``, the others are ``train``: no article is in both.
    """

    PACKAGE = "gensim"
    FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    SPLITS = ("train", "test")
    VERSION = 1  # raise when documents() gives other text for the same dump

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        if split not in self.SPLITS:
            raise UserError(f"dataset=wikipedia has no split '{split}'; choose {' or '.join(self.SPLITS)}")
        return fingerprint({"dump": store.file_hash(self._file()), "version": self.VERSION})

    def documents(self, split: str, data_root: str | None) -> Iterator[str]:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki

        number = 0
        with bz2.open(self._file()) as dump:
            for _title, markup, _id in extract_pages(dump, filter_namespaces=("0",)):
                text = filter_wiki(markup).strip()
                if text.lower().startswith("#redirect"):
                    continue
                if (number % 5 == 0) == (split == "test"):
                    yield text
                number += 1

    @classmethod
    def _file(cls) -> Path:
        if (file := packages.file_of(cls.PACKAGE, cls.FILE)) is not None:
            return file
        raise UserError(
            "dataset=wikipedia reads articles that the package gensim ships, which is not installed; "
            "run: pip install 'lowrank_lab[embedded]'"
        )


class JsonLines:
    """A file with a JSON object a line, whose ``field`` is a text. It has one split, called ``all``."""

    def __init__(self, file: str, field: str = "text") -> None:
        self.file = file
        self.field = field

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        file = Path(self.file).expanduser()
        if not file.is_file():
            raise UserError(f"there is no file {file}")
        jsonl.check_texts(file, self.documents(split, data_root), self.field, store)
        return fingerprint({"file": store.file_hash(file), "field": self.field})

    def documents(self, split: str, data_root: str | None) -> Iterator[str]:
        for where, row in jsonl.rows(Path(self.file).expanduser()):
            yield jsonl.text_field(row, self.field, where)


class HubCorpus:
    """A data set of the hub, or with ``data_root`` its mirror ``<data_root>/<mirror>/<split>.jsonl``.

    ``field`` is the field of a row that is its text. Where a row has several (an instruction and its answer),
    ``templates`` are format strings over the fields instead; the first one whose fields are all filled makes the
    text, the last one where none is. ``files`` names one file of the hub repository for each split, for data sets
    that are too large to fetch whole (C4) or whose loading script the datasets library no longer runs (PTB).
    """

    def __init__(
        self,
        mirror: str,
        hub: str,
        name: str | None,
        field: str | None,
        files: dict[str, str] | None = None,
        revision: str | None = None,
        templates: Sequence[str] | None = None,
    ) -> None:
        checks.text(mirror=mirror, hub=hub)
        checks.text(optional=True, name=name, field=field, revision=revision)
        if isinstance(templates, str) or not all(isinstance(template, str) for template in templates or ()):
            raise ValueError(f"templates={templates} is not valid; it must be a list of texts")
        if files is not None and not isinstance(files, Mapping):
            raise ValueError(f"files={files} is not valid; it must be a file for each split")
        if not (isinstance(hub, str) and hub.strip()):
            raise ValueError(f"hub={hub!r} is not valid; it must be the name of a data set")
        if (field is None) == (not templates):
            raise ValueError("a corpus needs either a field or templates")
        self.mirror = mirror
        self.hub = hub
        self.name = name
        self.field = field
        self.files = files
        self.revision = revision
        self.templates = list(templates or [])

    def content(self, split: str, data_root: str | None, store: Store) -> str:
        if data_root is not None:
            file = self._mirror_file(split, data_root)
            if not file.is_file():
                raise UserError(
                    f"data_root={data_root}: no file {file}; put the split there, choose another dataset= or "
                    "calibration=, or leave data_root out to use the hub"
                )
            documents, rule = self.documents(split, data_root), self.field or self.templates
            jsonl.check_texts(file, documents, rule, store)  # find a row that is no text now, not after hours
            return fingerprint({"file": store.file_hash(file), "field": self.field or self.templates})
        if self.files is not None and split not in self.files:
            raise UserError(f"{self.hub} has no split '{split}' here; choose {' or '.join(self.files)}")
        where = {"hub": self.hub, "name": self.name, "split": split, "files": self.files}
        return fingerprint({**where, "commit": self._commit(), "field": self.field or self.templates})

    def documents(self, split: str, data_root: str | None) -> Iterator[str]:
        if data_root is not None:
            for where, row in jsonl.rows(self._mirror_file(split, data_root)):
                yield self._text_of(row, where)
            return
        from datasets import load_dataset

        files = {split: self.files[split]} if self.files is not None else None
        rows = load_dataset(self.hub, self.name, data_files=files, split=split, revision=self._commit())
        for number, row in enumerate(rows, 1):
            yield self._text_of(row, f"data set {self.hub}, split {split}, row {number}")

    def _text_of(self, row: Mapping[str, Any], where: str) -> str:
        if self.field is not None:
            return jsonl.text_field(row, self.field, where)
        for template in self.templates:
            texts = {
                name: jsonl.text_field(row, name, where) for _, name, _, _ in Formatter().parse(template) if name
            }
            if all(texts.values()):
                break
        return template.format(**texts)

    def _mirror_file(self, split: str, data_root: str) -> Path:
        """Raises UserError for a name that leads to a file outside of ``data_root``."""
        name = Path(self.mirror, f"{split}.jsonl")
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            raise UserError(f"{name}: not a file below data_root={data_root}; give plain names")
        return Path(data_root) / name

    def _commit(self) -> str:
        """The commit of this data set, from the hub or without a network from the local cache."""
        try:
            return hub_commit("dataset", self.hub, self.revision)
        except Exception as error:  # no network, a timeout, a proxy: the client raises many kinds
            raise data_not_there(self.hub, error, f"{self.mirror}/<split>.jsonl") from None
