"""Grids in other processes, on this machine or on a cluster. Each runs the command of this program. No torch.

Processes that share a grid coordinate by the locks of its cells and artifacts (locks.py), and records have the
outcome of each cell. So this process only reports progress: a user may stop it, and the processes that it waits
for may die.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import REPORT, RUN
from lowrank_lab.cells import grid
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.hydra_private import argument_parser
from lowrank_lab.cells.spelling import literal
from lowrank_lab.cells.told import told_apart
from lowrank_lab.launching import jobs, slurm
from lowrank_lab.process import progress
from lowrank_lab.process.environment import cores
from lowrank_lab.records.results import RECORD_ENTRIES, Results
from lowrank_lab.records.seal import examine
from lowrank_lab.running import runner

log = logging.getLogger(__name__)

POLL_SECONDS = {"local": 1.0, "slurm": 10.0}
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Grid:
    """The unfinished part of a grid: by key, the cells that are not finished, and the overrides that select each.

    ``overrides`` select the whole grid, ``settings`` are Hydra's own entries of the command line. ``folder`` is
    for logs. ``finished`` counts the other cells.
    """

    results: Results
    cells: dict[str, Cell]
    overrides_of_cell: dict[str, list[str]]
    overrides: list[str]
    settings: list[str]
    folder: Path
    finished: int

    @classmethod
    def of(cls, configs: Sequence[DictConfig], hydra: DictConfig) -> Grid:
        """The grid from the composed configuration of each cell; ``hydra`` is Hydra's part of the launcher's.

        Raises UserError for cells whose keys depend on the process that measures them.
        """
        cells, overrides_of_cell = {}, {}
        words_of_all = [list(cfg.hydra.overrides.task) for cfg in configs]
        all_cells = told_apart([grid.cell_of(cfg, words) for cfg, words in zip(configs, words_of_all, strict=True)])
        for cell, words in zip(all_cells, words_of_all, strict=True):
            if timed := [name for name, evaluator in cell.evaluators.items() if evaluator.of_this_machine]:
                raise UserError(
                    f"eval={timed[0]} depends on the machine and the process that measures it; run it without "
                    f"hydra/launcher (on a cluster: srun {RUN} ...)"
                )
            if runner.finished(cell) is None:
                cells[cell.key], overrides_of_cell[cell.key] = cell, words
        results = Results(cell.cfg.results)
        overrides, settings = list(hydra.overrides.task), list(hydra.overrides.hydra)
        folder = Path(hydra.sweep.dir).expanduser().resolve()
        return cls(results, cells, overrides_of_cell, overrides, settings, folder, len(configs) - len(cells))

    def command(self, overrides: list[str], name: str) -> list[str]:
        """The command for the cells that ``overrides`` select, one by one, with its logs in folder ``name``."""
        arguments = argument_parser().parse_args()
        where = {"--config-name": arguments.config_name, "--config-dir": arguments.config_dir}
        flags = [f"{flag}={value}" for flag, value in where.items() if value]
        words = [*overrides, *self.settings, literal(f"hydra.sweep.dir={self.folder / name}")]
        return [sys.executable, str(Path(sys.argv[0]).resolve()), "--multirun", *flags, *words]


def local(unfinished: Grid, settings: dict[str, Any]) -> None:
    """Run a grid in ``workers`` processes. Raises UserError where cells are not done at the end."""
    workers = _workers(settings)
    threads = max(1, (cores() or 1) // workers)
    environment = {THREADS: str(threads), **os.environ, runner.LAUNCH: secrets.token_hex(8)}
    unfinished.folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(workers):
            with open(unfinished.folder / f"worker-{number}.log", "w") as out:
                # In a new session, as Ctrl-C then reaches this process alone, which stops each worker once.
                words = unfinished.command(unfinished.overrides, f"worker-{number}")
                process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
                processes.append(process)
        log.info("%d workers on %d cells; their output is in %s", workers, len(unfinished.cells), unfinished.folder)
        _report_progress(unfinished, lambda: any(process.poll() is None for process in processes), "local")
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.wait()
    failed = [number for number, process in enumerate(processes) if process.returncode != 0]
    _check_outcome(unfinished, *(unfinished.folder / f"worker-{number}.log" for number in failed[:1]))


def slurm_jobs(unfinished: Grid, settings: dict[str, Any]) -> None:
    """Run a grid with a SLURM job for each cell that has none yet. Raises UserError as ``local`` does."""
    slurm.check()
    active = _active_jobs(unfinished)
    new = [key for key in unfinished.cells if not active[key]]
    commands = [unfinished.command(unfinished.overrides_of_cell[key], key) for key in new]
    _wait(unfinished, active, _submit(unfinished, commands, [[key] for key in new], settings))


def slurm_array(unfinished: Grid, settings: dict[str, Any]) -> None:
    """Run a grid with ``workers`` SLURM jobs that share it; jobs of earlier commands count among them.

    Raises UserError as ``local`` does.
    """
    slurm.check()
    active = _active_jobs(unfinished)
    new = range(len(set().union(*active.values())), _workers(settings))
    commands = [unfinished.command(unfinished.overrides, f"worker-{number}") for number in new]
    _wait(unfinished, active, _submit(unfinished, commands, [list(unfinished.cells) for _ in new], settings))


def _workers(settings: dict[str, Any]) -> int:
    if not isinstance(workers := settings.pop("workers"), int) or workers < 1:
        raise UserError(f"hydra.launcher.workers={workers} is not valid; it must be a whole number from 1")
    return workers


def _active_jobs(unfinished: Grid) -> dict[str, set[str]]:
    """By cell, the jobs of earlier commands that are queued or run. Raises UserError if SLURM does not answer."""
    submitted = jobs.jobs_by_cell(unfinished.results)
    earlier = {key: {job.id for job in submitted.get(key, [])} for key in unfinished.cells}
    states = slurm.unfinished(set().union(*earlier.values()))
    if states is None:
        raise UserError(
            "squeue does not answer, so jobs of an earlier command may still work on these cells; repeat the "
            f"command when it answers, or delete {unfinished.results.root / 'jobs'} if these jobs have ended"
        )
    active = {job for job, state in states.items() if state != "COMPLETING"}
    if active:
        log.info("%d jobs of an earlier command work on these cells", len(active))
    return {key: ids & active for key, ids in earlier.items()}


def _submit(
    unfinished: Grid, commands: list[list[str]], keys: list[list[str]], settings: dict[str, Any]
) -> list[str]:
    """Submit a job for each command and save the keys of its cells; returns the ids of the jobs."""
    if not commands:
        return []
    environment = {grid.NAME: os.environ[grid.NAME], runner.LAUNCH: secrets.token_hex(8)}
    if settings["cpus_per_task"] and THREADS not in os.environ:
        environment[THREADS] = str(settings["cpus_per_task"])
    submitted = slurm.submit([slurm.Command(words, environment) for words in commands], settings)
    logs = settings["submitit_folder"]
    jobs.save(unfinished.results, dict(zip(submitted, keys, strict=True)), logs)
    log.info(
        "submitted %d jobs, %s to %s; their output is in %s", len(submitted), submitted[0], submitted[-1], logs
    )
    return submitted


def _wait(unfinished: Grid, active: dict[str, set[str]], submitted: list[str]) -> None:
    """Report the progress of SLURM jobs until they end. After Ctrl-C, print how to list and stop them."""
    submitted = [*set().union(*active.values()), *submitted]
    try:
        _report_progress(unfinished, lambda: slurm.unfinished(submitted) != {}, "slurm")
    except KeyboardInterrupt:
        arrays = " ".join(dict.fromkeys(job.partition("_")[0] for job in submitted))
        print("the jobs continue without this command; repeat it to see their progress", file=sys.stderr)
        print(f"list them: {REPORT} status; stop them: scancel {arrays}", file=sys.stderr)
        sys.exit(130)
    _check_outcome(unfinished)


def _report_progress(unfinished: Grid, is_active: Callable[[], bool], where: str) -> None:
    """Log each cell when it is finished, until all are, or until no process ``is_active``."""
    # Without warnings about damaged records, which ``Results.find`` gives before and after this.
    record_of = lambda key: examine(unfinished.results.path(key), RECORD_ENTRIES)[0]
    before = {key: record_of(key) for key in unfinished.cells}
    total, done, idle = unfinished.finished + len(unfinished.cells), unfinished.finished, 0
    while before and idle < 2:  # twice, as on a network's file system the last record may appear late
        idle = 0 if is_active() else idle + 1
        for key in list(before):
            record = record_of(key)
            if record is not None and record != before[key]:
                del before[key]
                done += 1
                facts = (done, total, unfinished.cells[key].label, record["status"], runner.summary(record))
                log.info("%d/%d %s: %s (%s)", *facts)
                progress.cell_done()
        if before:
            time.sleep(POLL_SECONDS[where])


def _check_outcome(unfinished: Grid, *logs: Path) -> None:
    """Raises UserError where a cell of the grid has failed or has no record; ``logs`` may show the reason."""
    records = [unfinished.results.find(key) for key in unfinished.cells]
    count = Counter("not finished" if record is None else record["status"] for record in records)
    if wrong := [f"{count[what]} {what}" for what in ("failed", "not finished") if count[what]]:
        sources = [f"{REPORT} status", *(str(log) for log in logs if count["not finished"])]
        why = f"{' or '.join(sources)} says why, and the same command tries them again"
        raise UserError(f"of {len(records)} cells {' and '.join(wrong)}; {why}")
