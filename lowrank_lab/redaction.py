"""Keys, tokens and passwords are taken out of text where it leaves the process: records, logs, what is printed.

A secret is the value of an environment variable with a telling name, a password of ~/.netrc, what looks like a key
of the hub or of W&B, and the user part of an address; in settings also the value of one that is called a password
or the like, and in logs and errors what is said to be one. No number of a record is one. No torch.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TextIO

from lowrank_lab.errors import UserError

HIDDEN = "[redacted]"
SHORTEST = 8  # characters of a secret
# Whole parts of a name: TOKENIZER_TYPE and MAX_TOKENS are others', and eos_token is a word of a model.
OF_A_MODEL = r"(?:bos|eos|pad|unk|sep|cls|mask|stop)_token"
NAME = re.compile(
    rf"(?!.*{OF_A_MODEL})(?!.*_(?:path|file|dir)$)(?:.*_)?"
    r"(?:token|api_?key|access_key|secret|passw(?:or)?d)(?:_.*)?",
    re.IGNORECASE,
)
# A number, a path, a word, or the name of the variable that has the secret.
INNOCENT = re.compile(r"[-+.\d_]+(?:e[-+]?\d+)?|(?:~|\.\.?)?/.*|[A-Za-z]?[a-z]*|.*\$\{.*", re.DOTALL)
# Old keys of W&B are 40 hexadecimal digits, as commits are: they are known by their variable, file or name alone.
BARE = re.compile(
    r"\b(?:hf_|api_org_)(?!(?:[a-z]+|[A-Z]+)\b)[A-Za-z0-9]{30,}|\bwandb_v\d+_\w{16,}|\blocal-[0-9a-f]{40}\b"
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # user:password@host
)
# In messages, where "unexpected token: '<|fim_1|>'" and "no secret: it is public" are none: letters and digits.
SAID = re.compile(
    rf"(?<![\w/])(?!(?:\w+_)?{OF_A_MODEL})((?:(?:\w+_)?(?:"
    r"(?:api_?key|access_key|secret|passw(?:or)?d)['\"]?\s?[=:]|token(?:=|['\"]\s?:))|bearer\s)\s?['\"]?)"
    r"(?=[^\s'\",;&]*[0-9])(?=[^\s'\",;&]*[a-z])[^\s'\",;&<>|]{8,}",
    re.IGNORECASE,
)


def redacted(value: Any) -> Any:
    """Plain data (text, lists, dicts) with ``HIDDEN`` in the place of every known secret and every key."""
    return _redacted(value, _known())


def _redacted(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, HIDDEN)
        return BARE.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {_redacted(name, known): _redacted(entry, known) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(entry, known) for entry in value]
    return value


def redacted_message(text: str) -> str:
    """A log line, an error or a traceback, also without what is said to be a password or the like."""
    return SAID.sub(lambda found: found[1] + HIDDEN, redacted(text))


def redacted_settings(settings: Any) -> Any:
    """A configuration as plain data, also without the values of settings that are called a password or the like."""
    return redacted(_without_named(settings))


def _without_named(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {
            name: HIDDEN if _is_named(name, value) else _without_named(value) for name, value in settings.items()
        }
    return [_without_named(value) for value in settings] if isinstance(settings, list) else settings


def _is_named(name: Any, value: Any) -> bool:
    """Whether ``value`` is a secret because of its name."""
    return isinstance(value, str) and NAME.fullmatch(str(name)) is not None and _looks_secret(value)


def _looks_secret(value: str) -> bool:
    return len(value) >= SHORTEST and not INNOCENT.fullmatch(value)


def _known() -> list[str]:
    """The secrets that this process was given, longer ones first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if _is_named(name, value)}
    found.update(value for value in _passwords(os.environ.get("NETRC")) if len(value) >= SHORTEST)
    return sorted(found, key=len, reverse=True)


@cache
def _passwords(file: str | None) -> tuple[str, ...]:
    """Those of a netrc file, the user's own where ``file`` is None."""
    try:
        hosts = netrc.netrc(file).hosts.values()
    except (OSError, netrc.NetrcParseError):
        return ()
    return tuple(password for _, _, password in hosts if password)


def refuse(words: Iterable[str]) -> None:
    """Raise UserError where one of the ``words`` of a command line, "name=value", holds a secret."""
    _refuse(word.partition("=")[::2] for word in words)


def refuse_in(settings: Mapping[str, Any]) -> None:
    """Raise UserError where a configuration, as plain data that is not resolved, holds a secret."""
    _refuse(_texts(settings))


def _texts(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text within plain data, and the name that it has or that the list has which it is in."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _texts(value, f"{name}.{key}".lstrip("."))
    elif isinstance(settings, list):
        for value in settings:
            yield from _texts(value, name)
    elif isinstance(settings, str):
        yield name, settings


def _refuse(settings: Iterable[tuple[str, str]]) -> None:
    """Others can read a command line, and the configuration is kept in records and by W&B."""
    known = _known()
    for name, value in settings:
        of_its_own = re.split(r"[.@/+~]", name)[-1]
        if _is_named(of_its_own, value) or _redacted([name, value], known) != [name, value]:
            raise UserError(
                f"{_redacted(name, known)}: a key or password has no place on a command line or in a "
                "configuration, which others can read and logs keep; set it in the environment (HF_TOKEN, "
                "WANDB_API_KEY), or log in"
            )


class Formatter(logging.Formatter):
    """Log lines, with their tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted_message(super().format(record))


class Stream:
    """A text stream to which no secret is written."""

    def __init__(self, stream: TextIO, without_secrets: Callable[[str], str]) -> None:
        self._stream, self._without_secrets = stream, without_secrets

    def write(self, text: str) -> int:
        self._stream.write(self._without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From now on nothing that this process prints holds a secret, nor do tracebacks that Python or Hydra print."""
    for name, without_secrets in (("stdout", redacted), ("stderr", redacted_message)):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name), without_secrets))
