"""Run one job or a grid. See ``python run.py --help``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_lab import grid, runner
from lowrank_lab.errors import UserError
from lowrank_lab.results import Results

CONFIG_DIR = Path(__file__).resolve().parent / "conf"
GRID_NAME = "LOWRANK_LAB_GRID"  # in the environment, so that jobs in other processes know it too


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> None:
    try:
        runner.run(cfg, os.environ.get(GRID_NAME))
    except UserError as error:
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(f"error: {error}")
        raise CompactHydraException(f"error: {error}") from error


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # argparse wants the overrides in one piece; people also write: run.py model=tiny -m ratio=0.8,0.6
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: "=" in word and not word.startswith("-"))
    arguments = get_args_parser().parse_args()
    asks_for_work = not (
        arguments.help
        or arguments.hydra_help
        or arguments.cfg
        or arguments.info
        or arguments.shell_completion
    )
    try:
        if asks_for_work and _nothing_to_do(arguments.overrides, arguments.multirun):
            return
        job()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; all that was finished is kept, the same command goes on from there")


def _nothing_to_do(overrides: list[str], multirun: bool) -> bool:
    """Check all cells before any work, note the grid; True where every cell is finished already."""
    cells = grid.plan(CONFIG_DIR, "config", overrides, multirun)
    results = Results(cells[0].cfg.results)
    os.environ[GRID_NAME] = results.note_grid(overrides, cells)
    records = [results.finished(cell.key) for cell in cells]
    finished = sum(record is not None for record in records)
    print(f"{len(cells)} cells, {finished} finished already", file=sys.stderr)
    return finished == len(cells)


if __name__ == "__main__":
    main()
