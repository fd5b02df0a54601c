"""The two exceptions for users. FloatingPointError says in one line what is not finite; all others are bugs."""


class UserError(Exception):
    """A problem that the user can correct. The message is one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """The lines that a notebook shows."""
        return [f"error: {self}"]


class SkippedCell(Exception):
    """A combination that is not possible. The record is ``skipped`` with this reason; the grid continues."""
