"""Ctrl-C and SIGTERM, so that no library can lose them; and a reader that has gone.

The signal raises KeyboardInterrupt at once, wherever the program is. In a destructor or a bare ``except`` of a
library it is lost, and in the middle of a library's bookkeeping it can come out as another error. So the signal is
noted as well: loops ask for it, and an error that comes after it is taken for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None


def install() -> None:
    """Handle Ctrl-C and SIGTERM in this process; a signal that the parent told it to ignore stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _report_unraisable


def end_with_reader() -> None:
    """From now on this process ends silently where nobody reads what it prints any more, as with ``| head``.

    Only for a command that does nothing else than print.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come, whose own exception may have been lost: for loops."""
    if _received is not None:
        raise KeyboardInterrupt(_received)


@contextmanager
def heeded() -> Iterator[None]:
    """Within it, any error that follows a signal becomes KeyboardInterrupt."""
    try:
        yield
    except Exception as error:
        if _received is not None:
            raise KeyboardInterrupt(_received) from error
        raise


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """The status of a process that a signal has stopped, as shells write it."""
    return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _stop(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises an error that follows instead of printing its traceback
    raise KeyboardInterrupt(number)


def _report_unraisable(lost: sys.UnraisableHookArgs) -> None:
    if not issubclass(lost.exc_type, KeyboardInterrupt):  # a loop finds it by check()
        sys.__unraisablehook__(lost)
