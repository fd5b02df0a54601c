"""generation_config.json, of which transformers refuses to save, or even to read, what others have published."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

log = logging.getLogger(__name__)

FILE = "generation_config.json"
SWITCHES = ("do_sample", "num_beams", "return_dict_in_generate")  # other entries go with these or do not


def readable(location: str, revision: str | None) -> GenerationConfig | None:
    """What transformers accepts of the model's file; None where it reads the file itself, or there is none."""
    try:
        GenerationConfig.from_pretrained(location, revision=revision)
    except OSError:  # there is none
        return None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        log.warning("%s: %s is not valid (%s)", location, FILE, str(error).partition("\n")[0])
        entries = json.loads(Path(cached_file(location, FILE, revision=revision)).read_text(encoding="utf-8"))
        return _accepted(entries if isinstance(entries, dict) else {})
    return None


def saveable(config: GenerationConfig) -> GenerationConfig:
    """``config`` without the entries that transformers refuses to save, such as a temperature without do_sample."""
    return config if _refused(config) is None else _accepted(config.to_diff_dict())


def _accepted(entries: dict[str, Any]) -> GenerationConfig:
    """The configuration of those ``entries`` that transformers saves; the others are logged."""
    kept: dict[str, Any] = {}
    for name in sorted(entries, key=lambda name: name not in SWITCHES):
        if (why := _refused({**kept, name: entries[name]})) is None:
            kept[name] = entries[name]
        else:
            log.warning("generation config: %s=%s is left out (%s)", name, entries[name], why)
    return GenerationConfig.from_dict(kept)


def _refused(config: GenerationConfig | dict[str, Any]) -> str | None:
    """Why transformers would not save a configuration, in a line; None where it would."""
    try:
        if isinstance(config, dict):
            config = GenerationConfig.from_dict(dict(config))
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # it checks few types, so that wrong ones raise anything
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None
