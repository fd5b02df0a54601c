"""Keys, tokens and passwords are taken out of text where it leaves the process: records, logs, what is printed.

A secret is the value of an environment variable with a telling name, a password of ~/.netrc, what looks like a key
of the hub or of W&B, a value that is called a password or the like, and the user part of an address. No torch.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TextIO

from lowrank_lab.errors import UserError

HIDDEN = "[redacted]"
SHORTEST = 8  # characters: what is shorter, as the "false" of TOKENIZERS_PARALLELISM, is no secret
VARIABLE = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD)(?!.*_(?:PATH|FILE|DIR)$)", re.IGNORECASE)
# Old keys of W&B are 40 hexadecimal digits, as commits are: they are known by their variable, file or name alone.
BARE = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|\blocal-[0-9a-f]{40}\b"
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # user:password@host
)
# A token has letters and digits, else "eos_token=tokenizer.eos_token" in a traceback would be one.
NAMED = re.compile(
    r"((?:api_?key|secret|passw(?:or)?d)['\"]?\s*[=:]\s*['\"]?)(?!\$\{)[^\s'\",;&]{6,}"
    r"|((?:token['\"]?\s*[=:]|bearer\s)\s*['\"]?)(?=[^\s'\",;&]*[0-9])(?=[^\s'\",;&]*[a-z])[^\s'\",;&]{8,}",
    re.IGNORECASE,
)


def redacted(value: Any) -> Any:
    """Plain data (text, lists, dicts) with ``HIDDEN`` in the place of every secret."""
    return _redacted(value, _known())


def _redacted(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, HIDDEN)
        return NAMED.sub(lambda found: (found[1] or found[2]) + HIDDEN, BARE.sub(HIDDEN, value))
    if isinstance(value, Mapping):
        return {_redacted(name, known): _entry(name, entry, known) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(entry, known) for entry in value]
    return value


def _entry(name: Any, value: Any, known: list[str]) -> Any:
    """The value of a dict, which its name may give away."""
    if not isinstance(value, (str, int)) or not VARIABLE.search(str(name)):
        return _redacted(value, known)
    pair = f"{name}={value}"
    without = _redacted(pair, known)
    return value if without == pair else without[len(_redacted(f"{name}=", known)) :]


def _known() -> list[str]:
    """The secrets that this process was given, longer ones first: one may be a part of another."""
    values = [value for name, value in os.environ.items() if VARIABLE.search(name)]
    found = {value for value in (*values, *_passwords(os.environ.get("NETRC"))) if len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


@cache
def _passwords(file: str | None) -> tuple[str, ...]:
    """Those of a netrc file, the user's own where ``file`` is None."""
    try:
        hosts = netrc.netrc(file).hosts.values()
    except (OSError, netrc.NetrcParseError):
        return ()
    return tuple(password for _, _, password in hosts if password)


def refuse(settings: Iterable[str]) -> None:
    """Raise UserError where one of the ``settings``, "name=value" or a line of YAML, holds a secret.

    Others can read a command line, and Hydra keeps it and the configuration beside its logs.
    """
    known = _known()
    for setting in settings:
        if (without := _redacted(setting, known)) != setting:
            name = re.split("[=:]", without)[0].strip()
            raise UserError(
                f"{name}: a key or password has no place on a command line or in a configuration, which others can "
                "read and logs keep; set it in the environment (HF_TOKEN, WANDB_API_KEY), or log in"
            )


class Formatter(logging.Formatter):
    """Log lines, with their tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class Stream:
    """A text stream to which no secret is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From now on nothing that this process prints holds a secret, nor do tracebacks that Python or Hydra print."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name)))
