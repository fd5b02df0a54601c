"""Who works on what: one holder at a time, on one machine or on many that share a folder. No torch.

A lock is filelock's lease: a file that names its holder, who renews it while it lives. A holder that died on this
machine is replaced at once, one on another machine when it has not renewed the lock for ``LEASE`` seconds of the
waiting process's own monotonic clock, so that no two clocks need to agree.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

LEASE = 60.0  # seconds; every process that shares a folder must have the same
LONG = 5  # leases
POLL = 0.5  # seconds between two looks at a lock that is waited for


class Busy(Exception):
    """Somebody else works on what is asked for, and the caller did not want to wait."""


@contextmanager
def held(file: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``file`` for the body, waiting for whoever has it; ``what`` tells a reader what it is for.

    Raises Busy at once where another process has it and ``wait`` is False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(file, lease_duration=LEASE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise Busy(f"{what}: {_somebody(file)} is at it") from None
        log.info("%s: waiting for %s, which is at it", what, _somebody(file))
        lock.acquire(poll_interval=POLL)
    try:
        yield
    finally:
        lock.release()


def holder(file: Path) -> str | None:
    """Who has the lock ``file``, as "process 123 on n1"; None where nobody does, or a process that is gone.

    One on another machine is taken for gone when it has long not renewed the lock by this machine's clock: good
    enough to tell a person, while to take the lock over ``held`` trusts no clock but its own. Here another process
    that now has a dead holder's number is taken for it: filelock compares when they started, for ``held``, but has
    no public way to ask.
    """
    owner = SoftFileLease(file, lease_duration=LEASE).owner
    if owner is None:
        return None
    if owner.hostname == socket.gethostname():
        gone = not _is_alive(owner.pid)
    else:
        try:
            gone = time.time() - file.stat().st_mtime > LONG * LEASE
        except FileNotFoundError:  # it has just let go
            gone = True
    return None if gone else f"process {owner.pid} on {owner.hostname}"


def _somebody(file: Path) -> str:
    return holder(file) or "another process"  # which has just let go


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
