"""Locks: one process at a time, on one machine or on many that share a folder. No torch.

A lock is filelock's lease: a file that names its owner, a process that renews it while it lives. A dead owner on
this machine is replaced at once. One on another machine is replaced when it has not renewed the lock for ``LEASE``
seconds of the waiting process's own monotonic clock, so that no two clocks need to agree.
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
LEASES_OF_DEAD = 5  # after so many without a renewal, an owner on another machine counts as dead
POLL = 0.5  # seconds between two attempts to take a lock


class LockedByAnother(Exception):
    """Another process holds the lock, and the caller did not want to wait."""


@contextmanager
def locked(file: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``file`` for the body; wait while another process holds it. ``what`` names it in messages.

    Raises LockedByAnother at once where another process holds it and ``wait`` is False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(file, lease_duration=LEASE)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise LockedByAnother(f"{what}: locked by {_owner_in_words(file)}") from None
        log.info("%s: waiting for %s, which has locked it", what, _owner_in_words(file))
        lease.acquire(poll_interval=POLL)
    try:
        yield
    finally:
        lease.release()


def owner(file: Path) -> str | None:
    """Which live process holds the lock ``file``, as "process 123 on n1"; None where none does.

    An owner on another machine counts as dead when by this machine's clock it has not renewed the lock for a long
    time: good enough for a message, while ``locked`` trusts no other machine's clock to replace an owner. A process
    that now has the number of a dead owner is taken for it: ``locked`` compares when they started, but filelock has
    no public way to ask.
    """
    found = SoftFileLease(file, lease_duration=LEASE).owner
    if found is None:
        return None
    if found.hostname == socket.gethostname():
        dead = not _is_alive(found.pid)
    else:
        try:
            dead = time.time() - file.stat().st_mtime > LEASES_OF_DEAD * LEASE
        except FileNotFoundError:  # its owner has just released it
            dead = True
    return None if dead else f"process {found.pid} on {found.hostname}"


def _owner_in_words(file: Path) -> str:
    return owner(file) or "another process"  # which has just released it


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True
