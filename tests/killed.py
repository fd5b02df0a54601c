"""Processes that kill themselves with SIGKILL in the middle of a stage; test_kills.py starts it once for all cases.

``python -m tests.killed`` reads a list of cases as JSON from stdin and forks for each: the process is small, has
one thread, and has all that is slow to import. A case is a list of overrides and what to die at: ``at``
("module:name", a function or a class's method), the ``call`` that is the last, whether it dies ``after`` that call
or in its place, and a text that is in the arguments of the calls that count. Prints the list of exit statuses.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from functools import reduce
from typing import Any

import torch

import lowrank_lab.running.pipeline
from lowrank_lab.cells import grid
from lowrank_lab.running import runner, training

from .conftest import REPOSITORY


def die(at: str, call: int, after: bool, of: str) -> None:
    """Have this process killed at a call of a function."""
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner: Any = reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    def dies(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += of in str(arguments)
        last = calls == call and of in str(arguments)
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dies)


def run_and_die(overrides: list[str], **when: Any) -> int:
    """The exit status of a process that does so: −9 where it was killed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        [cell] = grid.plan(REPOSITORY / "conf", "config", overrides, False)
        die(**when)
        runner.run(cell)
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # it should not have come so far


if __name__ == "__main__":
    assert lowrank_lab.running.pipeline  # it and torch are imported before the first fork
    torch.set_num_threads(1)
    training.SAVE_SECONDS = -1.0  # trainings keep their state after every step
    print(json.dumps([run_and_die(**case) for case in json.load(sys.stdin)]))
