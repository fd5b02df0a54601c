"""Rows of JSONL files, all read and checked here: one JSON object a line, in UTF-8. No torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError

CHECKS = 2  # raise when a check becomes stricter: files that passed are then checked again


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row and where it is, for messages. Blank lines are no rows. Raises UserError for a line that is none."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file} line {number}"
            if number > 1 and line.startswith(codecs.BOM_UTF8):  # the datasets library fails there
                raise UserError(f"{where}: it begins with a byte order mark, as where files were joined; remove it")
            if content := line.removeprefix(codecs.BOM_UTF8).strip():
                yield where, _row(content, where)


def check_texts(file: Path, texts: Iterator[str], rule: Any, store: Store) -> None:
    """Read all ``texts`` of ``file``, once for its content and the ``rule`` that takes texts out of rows.

    Raises what reading them raises, and UserError for a file without any text.
    """

    def check() -> None:
        found = False
        for text in texts:  # all of them are read
            found = found or bool(text.strip())
        if not found:
            raise UserError(f"{file}: it has no text; put the split there")

    store.check_once(file, {"texts": rule, "version": CHECKS}, check)


def check_rows(file: Path, store: Store) -> None:
    """Check that rows are alike, once for the content of ``file``: a reader elsewhere takes their fields.

    Raises UserError for a row without a field that the first row has, or with a value of another kind in it.
    """

    def check() -> None:
        kinds: dict[str, type] | None = None
        for where, row in rows(file):
            if kinds is None:
                kinds = {name: _kind(value) for name, value in row.items() if value is not None}
            for name, kind in kinds.items():
                _ = field(row, name, where)
                if _kind(row[name]) is not kind:
                    is_now = _in_words(row[name])
                    raise UserError(f"{where}: field '{name}' is {is_now}, in the first row it is not")
            check_unicode(json.dumps(row, ensure_ascii=False), where)
        if kinds is None:
            raise UserError(f"{file}: it has no rows; put the split there")

    store.check_once(file, {"rows": CHECKS}, check)


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The field ``name`` of a row. Raises UserError where the row has none."""
    if name not in row:
        raise UserError(f"{where}: no field '{name}'; it has: {', '.join(map(str, row))}")
    return row[name]


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in the field ``name`` of a row. Raises UserError where it has none that a tokenizer takes."""
    text = field(row, name, where)
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{name}' is not text but {_in_words(text)}")
    return check_unicode(text, f"{where}: field '{name}'")


def check_unicode(text: str, where: str) -> str:
    """``text``. Raises UserError for half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return text


def _row(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; convert the file") from None
    except (ValueError, RecursionError):  # no JSON, a number of too many digits, too deeply nested
        raise UserError(f"{where}: not a JSON object; write one a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {_in_words(row)}; write one a line")
    return row


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _in_words(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")
