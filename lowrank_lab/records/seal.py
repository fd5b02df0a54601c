"""Records that tell whether they were changed after they were written. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SEAL = "sha256"  # of all other entries; records that were written before there was one have none


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as it is read back from JSON, with its checksum."""
    plain = json.loads(json.dumps(record))
    return {**plain, SEAL: _checksum(plain)}


def read(file: Path, entries: set[str]) -> dict[str, Any] | None:
    """A record or grid with these ``entries``; None, with a warning, for a file that is damaged."""
    value, wrong = examine(file, entries)
    if value is None:
        log.warning("%s %s and is left out; run its cell again, or delete it", file, wrong)
    return value


def examine(file: Path, entries: set[str]) -> tuple[dict[str, Any] | None, str]:
    """A record or grid with these ``entries`` as it was written; else None, and what is wrong with the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
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
