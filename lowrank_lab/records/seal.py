"""Checksums of records, which show whether a record was changed after it was written. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SEAL = "sha256"  # the entry with the checksum of all others; old records do not have it


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as JSON would give it back, with its checksum."""
    plain = json.loads(json.dumps(record))
    return {**plain, SEAL: _checksum(plain)}


def read(file: Path, entries: set[str]) -> dict[str, Any] | None:
    """The record or grid in ``file`` if it has these ``entries``; None, with a warning, if it is damaged."""
    value, wrong = examine(file, entries)
    if value is None:
        log.warning("%s %s and is left out; run its cell again, or delete it", file, wrong)
    return value


def examine(file: Path, entries: set[str]) -> tuple[dict[str, Any] | None, str]:
    """The record or grid in ``file`` if it is unchanged; else None, and what is wrong with the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError:
        return None, "is not readable for you"
    except (ValueError, OSError):
        return None, "cannot be read"
    without_number = isinstance(value, dict) and value.get("status") in ("failed", "skipped")
    if not isinstance(value, dict) or not entries | ({"reason"} if without_number else set()) <= value.keys():
        return None, "cannot be read"
    if SEAL in value and value[SEAL] != _checksum(value):
        return None, "was changed after it was written (its checksum differs)"
    return value, ""


def _checksum(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
