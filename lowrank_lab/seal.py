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
    """A record or grid with these entries; None, with a warning, for a file that is not what this program wrote."""
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError):
        value = None
    if (why := damage(value, entries)) is None:
        return value
    log.warning("%s %s and is left out; run its cell again, or delete it", file, why)
    return None


def damage(value: Any, entries: set[str]) -> str | None:
    """What is wrong with a record or grid as it was read, which must have ``entries``; None where nothing is."""
    without_number = isinstance(value, dict) and value.get("status") in ("failed", "skipped")
    if not isinstance(value, dict) or not entries | ({"reason"} if without_number else set()) <= value.keys():
        return "cannot be read"
    if SEAL in value and value[SEAL] != _checksum(value):
        return "was changed after it was written (its checksum differs)"
    return None


def _checksum(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
