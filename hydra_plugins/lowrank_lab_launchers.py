"""The launchers of conf/hydra/launcher. Hydra takes launchers from this namespace package alone.

It imports this module at every start; what the launchers do is imported when they do it.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from lowrank_lab.cells.hydra_private import basic_launcher

if TYPE_CHECKING:
    from lowrank_lab.launching.grids import Grid


class _OtherProcesses(basic_launcher.BasicLauncher):
    """A launcher whose jobs are other processes: their results are in records, and nothing is returned.

    Each has the same command, launcher included, and runs its cells itself, as Hydra's basic launcher does.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lowrank_lab.basics.errors import UserError
        from lowrank_lab.launching.grids import Grid
        from lowrank_lab.running.runner import LAUNCH

        if LAUNCH in os.environ:
            return super().launch(job_overrides, initial_job_idx)
        loader = self.hydra_context.config_loader
        configs = [loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        try:
            self.run(Grid.of(configs, self.config.hydra))
        except UserError as error:
            raise CompactHydraException(f"error: {error}") from error
        return []

    @abstractmethod
    def run(self, grid: Grid) -> None: ...


class Slurm(_OtherProcesses):
    def run(self, grid: Grid) -> None:
        from lowrank_lab.launching.grids import slurm_jobs

        slurm_jobs(grid, self.settings)


class SlurmArray(_OtherProcesses):
    def run(self, grid: Grid) -> None:
        from lowrank_lab.launching.grids import slurm_array

        slurm_array(grid, self.settings)


class Local(_OtherProcesses):
    def run(self, grid: Grid) -> None:
        from lowrank_lab.launching.grids import local

        local(grid, self.settings)
