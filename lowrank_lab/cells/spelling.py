"""The words of a command line: spelled as Hydra wants them, and what is told of words that are none. No torch."""

from __future__ import annotations

import os
import re
import shlex
from decimal import Decimal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException

from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells.paths import expanded

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
MOST_VALUES = 10_000  # of a range
FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")


def spelled_out(words: list[str]) -> list[str]:
    """A command line as Hydra reads it. Raises UserError for a range that has no end.

    ``save=true`` is ``save.checkpoint=true``: Hydra cannot have both ``save=true`` and ``save.merge=true``, as the
    first would replace the node of the second, and options of a group cannot have the names true and false.
    ``eval=a,b`` is ``eval=[a,b]``: Hydra would read a grid, while all evaluations of a model belong to one job.
    ``ratio=0.2:0.9:0.1`` and a ``range`` of fractions are their values, the end included.
    ``~`` in Hydra's flags that name a folder is the home folder, also where quotes keep it from the shell.
    """
    return [_spelled_out(word, before) for before, word in zip(["", *words], words, strict=False)]


def quoted(word: str) -> str:
    """``literal(word)`` for a shell."""
    return shlex.quote(literal(word))


def literal(word: str) -> str:
    """``key=value`` with a value that Hydra takes as it is, whatever its characters."""
    key, _, value = word.partition("=")
    if value[:1] == value[-1:] and value[:1] in ("'", '"') and len(value) > 1:
        value = value[1:-1]
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)  # no interpolation
    value = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', value)
    value = re.sub(r"(\\+)$", lambda found: found[1] * 2, value)
    return f'{key}="{value}"'


def is_parsed(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        return "ConfigLoader is not set" in str(error)  # of glob(), which needs Hydra's
    return True


def _spelled_out(word: str, before: str) -> str:
    if before in FOLDERS:
        return expanded(word)
    key, _, value = word.partition("=")
    if key in FOLDERS and value:
        return f"{key}={expanded(value)}"
    if key == "save":
        return f"save.checkpoint={value}"
    if key == "eval" and re.fullmatch(r"\w+(,\w+)+", value):
        return f"eval=[{value}]"
    if key.startswith("hydra.") and re.match(r"['\"]?~", value):  # Hydra's own folders, which it makes itself
        return f"{key}='{os.path.expanduser(value.strip(chr(39) + chr(34)))}'"
    if spelled := re.fullmatch(f"({NUMBER}):({NUMBER}):({NUMBER})", value):
        start, stop, step = map(Decimal, spelled.groups())
        return f"{key}={_values(word, start, stop, step)}"
    if value.startswith("range(") and is_parsed(word):
        swept = OverridesParser.create().parse_override(word).value()
        if isinstance(swept, RangeSweep) and not swept.shuffle:
            numbers = (swept.start, swept.stop, swept.step)
            if any(isinstance(number, float) for number in numbers):
                return f"{key}={_values(word, *(Decimal(str(number)) for number in numbers))}"
    return word


def _values(word: str, start: Decimal, stop: Decimal, step: Decimal) -> str:
    """The values from ``start`` to ``stop``, both included, exactly as they would be written by hand."""
    if not all(number.is_finite() for number in (start, stop, step)) or step == 0:
        raise UserError(f"{word}: not a range; write start:stop:step, as in ratio=0.2:0.9:0.1")
    count = int((stop - start) / step) + 1
    if not 0 < count <= MOST_VALUES or (stop - start) / step < 0:
        raise UserError(f"{word}: a range of no values, or of more than {MOST_VALUES}; write start:stop:step")
    return ",".join(format(start + step * number, "f") for number in range(count))
