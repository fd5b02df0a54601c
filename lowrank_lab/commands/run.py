"""Run one job or a grid. See ``python run.py --help``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lowrank_lab import __version__
from lowrank_lab.artifacts.locks import LockedByAnother
from lowrank_lab.basics import redaction
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import CONF, REPORT, RUN
from lowrank_lab.cells import grid, hints, spelling
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.hydra_private import argument_parser, hide_private_options, leave_settings_to_jobs
from lowrank_lab.process import progress, stopping
from lowrank_lab.records.results import Results
from lowrank_lab.running import runner

log = logging.getLogger(__name__)

OmegaConf.register_new_resolver("typed", {"run": RUN, "report": REPORT}.__getitem__, replace=True)
OmegaConf.register_new_resolver("described", lambda group: hints.described(CONF, group), replace=True)

_cells: list[Cell] = []  # those of this command in the order of Hydra's jobs
_postponed: list[Cell] = []  # cells that wait for another process
_finished: dict[str, dict[str, Any]] = {}  # by key, the records that were there before


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(_cfg: DictConfig) -> None:
    stopping.check()
    redaction.guard_streams()  # also in a process that a launcher has started
    hydra_cfg = HydraConfig.get()
    is_basic = hydra_cfg.launcher._target_.endswith("BasicLauncher") or runner.LAUNCH in os.environ
    one_by_one = hydra_cfg.mode == RunMode.MULTIRUN and is_basic
    cell = _cells[hydra_cfg.job.num if hydra_cfg.mode == RunMode.MULTIRUN else 0]
    postponed = False
    try:
        runner.run(cell, os.environ.get(grid.NAME), wait=not one_by_one)
    except LockedByAnother as error:
        log.info("%s; this cell runs later", error)
        _postponed.append(cell)
        postponed = True
    except (UserError, FloatingPointError) as error:
        if hydra_cfg.mode == RunMode.RUN:
            sys.exit(f"error: {error}")
        raise CompactHydraException(f"error: {cell.label}: {error}") from error
    finally:
        if not postponed and cell.key not in _finished:
            progress.cell_done()


def main() -> None:
    redaction.guard_streams()
    stopping.install()
    # argparse wants the overrides in one piece; people also write: run.py model=tiny -m ratio=0.8,0.6
    try:
        words = spelling.spelled_out(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    if "--version" in words:
        stopping.end_with_reader()
        print(f"lowrank_lab {__version__}")
        return
    sys.argv[1:] = sorted(words, key=lambda word: "=" in word and not word.startswith("-"))
    hide_private_options()
    arguments, unknown = argument_parser().parse_known_args()
    if unknown:
        sys.exit(f"error: {hints.unknown_flag(unknown[0], words)}")
    option_folders = [CONF, *map(Path, filter(None, [arguments.config_dir]))]
    try:
        sys.argv[1:] = hints.without_globs(option_folders, sys.argv[1:])
        arguments.overrides = hints.without_globs(option_folders, arguments.overrides)
    except UserError as error:
        sys.exit(f"error: {error}")
    is_run = not (
        arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    )
    try:
        with stopping.heeded():
            if is_run:
                leave_settings_to_jobs()
                _cells.extend(_plan(arguments))
                if not _cells:
                    return
                with progress.grid(sum(cell.key not in _finished for cell in _cells)):
                    _run()
            else:
                stopping.end_with_reader()  # python run.py --help | head
                job()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print("stopped; finished results are kept, repeat the command to continue", file=sys.stderr)
        sys.exit(stopping.exit_status(interrupt))


def _run() -> None:
    """Run Hydra's jobs, and then the cells that waited for other processes."""
    status: int | str | None = None
    try:
        job()
    except SystemExit as failed:
        status = failed.code
    if not runner.run_postponed(_postponed, os.environ.get(grid.NAME)):
        status = 1
    if status:
        sys.exit(status)


def _plan(arguments: argparse.Namespace) -> list[Cell]:
    """Check all cells before any work and write down the grid; returns none where every cell is finished."""
    redaction.refuse(arguments.overrides)
    overrides = list(arguments.overrides)
    if not arguments.multirun and any(word.startswith("hydra/launcher=") for word in overrides):
        raise UserError("hydra/launcher is for grids; add -m")
    if arguments.config_dir:
        if not Path(arguments.config_dir).is_dir():
            raise UserError(f"--config-dir={arguments.config_dir}: no such folder")
        _, _, quoted = spelling.literal(f"=file://{Path(arguments.config_dir).resolve()}").partition("=")
        overrides.append(f"hydra.searchpath=[{quoted}]")
    cells = grid.plan(CONF, arguments.config_name or "config", overrides, arguments.multirun)
    if cells[0].cfg.dry_run:
        from lowrank_lab.planning.dry_run import print_needs

        stopping.end_with_reader()
        sys.exit(0 if print_needs(cells) else 1)
    _finished.update({cell.key: record for cell in cells if (record := runner.finished(cell)) is not None})
    count = sum(cell.key in _finished for cell in cells)  # two cells may have one key
    if not any(word.startswith("hydra/launcher=slurm") for word in overrides):  # else jobs run elsewhere
        runner.check_devices(cell for cell in cells if cell.key not in _finished)
    print(f"{len(cells)} cells, {count} finished already", file=sys.stderr)
    if grid.NAME not in os.environ:  # else a launcher has written down the grid of this process
        _check_models([cell for cell in cells if cell.key not in _finished])
        for root in dict.fromkeys(cell.cfg.results for cell in cells):
            of_root = [cell for cell in cells if cell.cfg.results == root]
            os.environ[grid.NAME] = Results(root).write_grid(arguments.overrides, of_root)
    if count < len(cells):
        return cells
    for cell in {cell.key: cell for cell in cells}.values():
        record = _finished[cell.key]
        told = f"{cell.label}: {record['status']} ({runner.summary(record)}){runner.tracked(cell, record)}"
        print(told, file=sys.stderr)
    print(f"nothing to do; {REPORT} makes the table", file=sys.stderr)
    return []


def _check_models(cells: list[Cell]) -> None:
    """Look at the weights of model folders, which needs torch, where there is work that needs it as well."""
    if any(cell.source.kind == "folder" for cell in cells):
        from lowrank_lab.planning.models import check_folders

        check_folders(cells)


if __name__ == "__main__":
    main()
