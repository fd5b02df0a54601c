"""The two exceptions a user is meant to read; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something the user can put right. The message is one line that says what to do."""


class SkippedCell(Exception):
    """A combination that makes no sense. It is recorded as skipped with this reason; the grid goes on."""
