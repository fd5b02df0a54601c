"""SLURM: submit commands as jobs (through submitit), and query the states of jobs. No torch."""

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

from lowrank_lab.basics.errors import UserError

SECONDS_TO_STOP = 15  # given to a command to stop before it is killed
QUERY_SECONDS = 60


@dataclass
class Command:
    """A command as a job: submitit pickles it, calls it on the node, and queues it again through ``checkpoint``.

    ``environment`` is added to that of the job.
    """

    words: list[str]
    environment: dict[str, str]

    def __call__(self) -> None:
        """Run the command until it ends, and exit with its status."""
        # SLURM sends the signal before the time limit to all processes of a job; only submitit should handle it.
        self._process = subprocess.Popen(
            self.words, env={**os.environ, **self.environment}, preexec_fn=_ignore_time_limit_signal
        )
        while (status := self._process.poll()) is None:  # wait() would hold a lock that checkpoint's wait() needs
            time.sleep(0.2)
        sys.exit(128 - status if status < 0 else status)

    def checkpoint(self) -> Any:
        """At the time limit or a preemption: stop the command; returns what the job runs when it starts again."""
        from submitit.helpers import DelayedSubmission

        _ignore_time_limit_signal()  # the signal is sent repeatedly
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return DelayedSubmission(Command(self.words, self.environment))


def _ignore_time_limit_signal() -> None:
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

    Raises UserError with the error of sbatch.
    """
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    of_executor = ("submitit_folder", "max_num_timeout")
    folder, timeouts = (settings[name] for name in of_executor)
    executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
    parameters = {f"slurm_{name}": value for name, value in settings.items() if name not in of_executor}
    executor.update_parameters(**parameters)
    try:
        return [job.job_id for job in executor.submit_array(commands)]
    except (FailedJobError, FailedSubmissionError) as error:
        why = str(error).splitlines()[-1]  # submitit has printed all of it
        raise UserError(f"SLURM refused the jobs ({why}); see conf/hydra/launcher/_cluster.yaml") from error


def unfinished(jobs: Collection[str]) -> dict[str, str] | None:
    """The state (PENDING, RUNNING, ...) of each job that has not ended; None where squeue does not answer."""
    if not (ids := _ids(jobs)):
        return {}
    answer, error = _query("squeue", "--noheader", "--array", "--format=%i|%T", f"--jobs={ids}")
    if answer is None:
        return {} if "Invalid job id" in error else None
    known = dict(line.split("|") for line in answer.split())
    return {job: known[job] for job in jobs if job in known}


def final_states(jobs: Collection[str]) -> dict[str, str]:
    """The final states (CANCELLED, TIMEOUT, ...) of ended jobs that SLURM still lists."""
    if not (ids := _ids(jobs)):
        return {}
    answer, _ = _query(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={ids}"
    )
    known = dict(line.split("|") for line in (answer or "").splitlines())
    return {job: known[job].split()[0] for job in jobs if job in known}  # "CANCELLED by 1000"


def _ids(jobs: Collection[str]) -> str:
    """The ids of whole arrays, which both commands list task by task: the ids of all tasks may be too long."""
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _query(*command: str) -> tuple[str | None, str]:
    """The output of a command, None where it fails; and its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    return (done.stdout if done.returncode == 0 else None), done.stderr
