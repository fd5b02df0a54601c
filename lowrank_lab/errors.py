"""The two exceptions a user is meant to read; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something the user can put right. The message is one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it."""
        return [f"error: {self}"]


class SkippedCell(Exception):
    """A combination that makes no sense. It is recorded as skipped with this reason; the grid goes on."""
