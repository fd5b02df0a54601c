"""Command lines in forks of one process that has imported torch and transformers, which takes seconds.

``python -m tests.forked`` reads one request a line, as JSON, and answers each with a line of stdout: the exit
status of its command. A request has ``words`` (a script of this repository and its arguments), ``environment``, and
``stdout`` and ``stderr``, files to write to. A test of how a process starts needs a new process instead.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


class Forks:
    """The process that is forked, as tests use it; it starts when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a script of this repository with the environment of now: its exit status and what it printed."""
        if self.process is None:
            command = [sys.executable, "-m", "tests.forked"]
            piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, cwd=REPOSITORY, text=True, **piped)
        assert self.process.stdin is not None and self.process.stdout is not None
        with TemporaryDirectory() as folder:
            stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
            files = {"stdout": str(stdout), "stderr": str(stderr)}
            request = {"words": words, "environment": dict(os.environ), **files}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, status, stdout.read_text(), stderr.read_text())

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


def main() -> None:
    import hydra  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import lowrank_lab.running.pipeline  # noqa: F401
    from lowrank_lab.cells import grid
    from lowrank_lab.process.garbage import collect_rarely

    from .composed import map_choices_where_needed, parse_yaml_once

    torch.set_num_threads(1)
    parse_yaml_once()
    map_choices_where_needed()
    collect_rarely()
    grid.configurations(
        REPOSITORY / "conf", "config", ["model=tiny", "ratio=0.8,0.6"]
    )  # what it parses is known to all
    gc.freeze()  # what is there already is not looked through again in every fork
    for line in iter(sys.stdin.readline, ""):
        if (child := os.fork()) == 0:
            run_here(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_here(request: dict[str, Any]) -> None:
    """Run a script as ``python script`` does; what it raises ends this process."""
    given = [os.open(os.devnull, os.O_RDONLY)]
    given += [os.open(request[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    for descriptor, file in enumerate(given):
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    runpy.run_path(str(REPOSITORY / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
