"""Remove keys, tokens and passwords from all text that leaves the process: records, logs, printed output.

A secret is the value of an environment variable whose name says so, a password of ~/.netrc, a string in the form of
a key of the hub or of W&B, and the user part of an address. In settings it is also the value of a setting with such
a name, and in logs and errors the text after such a name. Numbers of a record are never secrets. No torch.
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

from lowrank_lab.basics.errors import UserError

HIDDEN = "[redacted]"
MIN_LENGTH = 8  # characters of a secret
# Whole parts of a name: TOKENIZER_TYPE and MAX_TOKENS are no secrets, nor is eos_token, which is part of a model.
OF_A_MODEL = r"(?:bos|eos|pad|unk|sep|cls|mask|stop)_token"
NAME = re.compile(
    rf"(?!.*{OF_A_MODEL})(?!.*_(?:path|file|dir)$)(?:.*_)?"
    r"(?:token|api_?key|access_key|secret|passw(?:or)?d)(?:_.*)?",
    re.IGNORECASE,
)
# A number, a path, a word, or the name of the variable that has the secret.
NOT_SECRET = re.compile(r"[-+.\d_]+(?:e[-+]?\d+)?|(?:~|\.\.?)?/.*|[A-Za-z]?[a-z]*|.*\$\{.*", re.DOTALL)
# Old keys of W&B are 40 hexadecimal digits, as commits are: only their variable, file or name identifies them.
KEY_PATTERN = re.compile(
    r"\b(?:hf_|api_org_)(?!(?:[a-z]+|[A-Z]+)\b)[A-Za-z0-9]{30,}|\bwandb_v\d+_\w{16,}|\blocal-[0-9a-f]{40}\b"
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # user:password@host
)
# In messages a secret has letters and digits, unlike "unexpected token: '<|fim_1|>'" and "no secret: it is public".
IN_MESSAGES = re.compile(
    rf"(?<![\w/])(?!(?:\w+_)?{OF_A_MODEL})((?:(?:\w+_)?(?:"
    r"(?:api_?key|access_key|secret|passw(?:or)?d)['\"]?\s?[=:]|token(?:=|['\"]\s?:))|bearer\s)\s?['\"]?)"
    r"(?=[^\s'\",;&]*[0-9])(?=[^\s'\",;&]*[a-z])[^\s'\",;&<>|]{8,}",
    re.IGNORECASE,
)


def redacted(value: Any) -> Any:
    """Plain data (text, lists, dicts) with ``HIDDEN`` in place of every known secret and every key."""
    return _redacted(value, _secrets_of_process())


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return KEY_PATTERN.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {_redacted(name, secrets): _redacted(entry, secrets) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(entry, secrets) for entry in value]
    return value


def redacted_message(text: str) -> str:
    """A log line, an error or a traceback, also without text that follows "password", "token" and so on."""
    return IN_MESSAGES.sub(lambda found: found[1] + HIDDEN, redacted(text))


def redacted_settings(settings: Any) -> Any:
    """A configuration as plain data, also without the values of settings with a name such as "password"."""
    return redacted(_without_named(settings))


def _without_named(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {
            name: HIDDEN if _is_named(name, value) else _without_named(value) for name, value in settings.items()
        }
    return [_without_named(value) for value in settings] if isinstance(settings, list) else settings


def _is_named(name: Any, value: Any) -> bool:
    """Whether ``name`` says that ``value`` is a secret."""
    return isinstance(value, str) and NAME.fullmatch(str(name)) is not None and _looks_secret(value)


def _looks_secret(value: str) -> bool:
    return len(value) >= MIN_LENGTH and not NOT_SECRET.fullmatch(value)


def _secrets_of_process() -> list[str]:
    """The secrets in the environment of this process, longer ones first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if _is_named(name, value)}
    found.update(value for value in _passwords(os.environ.get("NETRC")) if len(value) >= MIN_LENGTH)
    return sorted(found, key=len, reverse=True)


@cache
def _passwords(file: str | None) -> tuple[str, ...]:
    """The passwords in a netrc file, by default the user's."""
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
    """Every text within plain data, with its name or that of its list."""
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
    secrets = _secrets_of_process()
    for name, value in settings:
        last_part = re.split(r"[.@/+~]", name)[-1]
        if _is_named(last_part, value) or _redacted([name, value], secrets) != [name, value]:
            raise UserError(
                f"{_redacted(name, secrets)}: a key or password must not be on a command line or in a "
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
    """From now on remove secrets from all that this process prints, also from tracebacks of Python and Hydra."""
    for name, without_secrets in (("stdout", redacted), ("stderr", redacted_message)):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name), without_secrets))
