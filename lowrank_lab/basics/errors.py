"""The two exceptions for users. FloatingPointError says in one line what is not finite; all others are bugs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A problem that the user can correct. The message is one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """The lines that a notebook shows."""
        return [f"error: {self}"]


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put ``where``, such as the full name of a linear, in front of what the body finds not to be finite."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}") from None


class SkippedCell(Exception):
    """A combination that is not possible. The record is ``skipped`` with this reason; the grid continues."""
