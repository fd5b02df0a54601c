"""SLURM: submitting commands as jobs (through submitit), and asking what has become of them. No torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lowrank_lab.errors import UserError

SECONDS_TO_STOP = 15  # for a command, before it is killed
SECONDS_TO_ANSWER = 60


@dataclass
class Command:
    """A command as a job: submitit pickles it here, calls it on the node, and queues it again by ``checkpoint``.

    ``environment`` is added to that of the job.
    """

    words: list[str]
    environment: dict[str, str]

    def __call__(self) -> None:
        """Run the command to its end, and end as it did."""
        # SLURM signals all processes of a job; the signal before the end of its time is for submitit.
        self._process = subprocess.Popen(
            self.words, env={**os.environ, **self.environment}, preexec_fn=_ignore_end_of_time
        )
        while (status := self._process.poll()) is None:  # wait() would hold a lock that checkpoint's wait() needs
            time.sleep(0.2)
        sys.exit(128 - status if status < 0 else status)

    def checkpoint(self) -> Any:
        """Out of time, or preempted: stop the command, and say what to run when the job's turn comes again."""
        from submitit.helpers import DelayedSubmission

        _ignore_end_of_time()  # the signal comes again and again
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return DelayedSubmission(Command(self.words, self.environment))


def _ignore_end_of_time() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def check() -> None:
    """Raises UserError where jobs cannot be submitted."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise UserError("SLURM's launchers need submitit; install it: pip install -e '.[slurm]'") from None
    if shutil.which("sbatch") is None:
        raise UserError("this machine has no sbatch; start the command on a login node of the cluster")


def submit(commands: list[Command], settings: dict[str, Any]) -> list[str]:
    """The id of the job of each command. ``settings`` are those of conf/hydra/launcher/_cluster.yaml.

    Raises UserError with what sbatch has against it.
    """
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    of_executor = ("submitit_folder", "max_num_timeout")
    folder, timeouts = (settings[name] for name in of_executor)
    executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
    asked = {f"slurm_{name}": value for name, value in settings.items() if name not in of_executor}
    executor.update_parameters(**asked)
    try:
        return [job.job_id for job in executor.submit_array(commands)]
    except (FailedJobError, FailedSubmissionError) as error:
        why = str(error).splitlines()[-1]  # submitit has printed all of it
        raise UserError(f"SLURM takes no such jobs ({why}); see conf/hydra/launcher/_cluster.yaml") from error


def unfinished(jobs: Collection[str]) -> dict[str, str] | None:
    """Those of ``jobs`` that SLURM still has to do with, and their state (PENDING, RUNNING, ...); None where it
    cannot be asked."""
    if not (ids := _ids(jobs)):
        return {}
    answer, error = _ask("squeue", "--noheader", "--array", "--format=%i|%T", f"--jobs={ids}")
    if answer is None:
        return {} if "Invalid job id" in error else None
    known = dict(line.split("|") for line in answer.split())
    return {job: known[job] for job in jobs if job in known}


def ends(jobs: Collection[str]) -> dict[str, str]:
    """How jobs have ended (CANCELLED, TIMEOUT, ...), of those whose end SLURM remembers."""
    if not (ids := _ids(jobs)):
        return {}
    answer, _ = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={ids}")
    known = dict(line.split("|") for line in (answer or "").splitlines())
    return {job: known[job].split()[0] for job in jobs if job in known}  # "CANCELLED by 1000"


def _ids(jobs: Collection[str]) -> str:
    """Whole arrays, which both commands list task by task: a name for each of their tasks may be too long."""
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _ask(*command: str) -> tuple[str | None, str]:
    """What a command prints, None where it fails; and its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    return (done.stdout if done.returncode == 0 else None), done.stderr
