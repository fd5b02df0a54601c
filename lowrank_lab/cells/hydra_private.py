"""All uses of Hydra's private parts. A new version of Hydra may break this file, and no other."""

from __future__ import annotations

from argparse import ArgumentParser
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import basic_launcher, basic_sweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

# The modules, not their classes: Hydra runs both once more when it looks for plugins, and then has other classes.
__all__ = [
    "argument_parser",
    "basic_launcher",
    "basic_sweeper",
    "combinations",
    "composed",
    "hide_private_options",
    "leave_settings_to_jobs",
]


def hide_private_options() -> None:
    """Do not offer options whose names begin with _ in help, completions and globs; others may include them."""
    of_group = ConfigLoaderImpl.get_group_options

    def offered(*arguments: Any, **settings: Any) -> list[str]:
        return [option for option in of_group(*arguments, **settings) if not option.startswith("_")]

    ConfigLoaderImpl.get_group_options = offered


def leave_settings_to_jobs() -> None:
    """Let Hydra begin a grid with settings that only the options of its jobs have: all jobs are planned."""
    of_all, load = ConfigLoaderImpl._apply_overrides_to_config, ConfigLoaderImpl.load_configuration

    def of_grid(overrides: list[Override], cfg: DictConfig) -> None:
        for override in overrides:
            with nullcontext() if override.is_hydra_override() else suppress(ConfigCompositionException):
                of_all([override], cfg)

    def loaded(
        self: Any, config_name: str | None, overrides: list[str], run_mode: RunMode, **rest: Any
    ) -> DictConfig:
        of_run = of_grid if run_mode == RunMode.MULTIRUN else of_all
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(of_run)
        return load(self, config_name, overrides, run_mode, **rest)

    ConfigLoaderImpl.load_configuration = loaded


def argument_parser() -> ArgumentParser:
    """The parser of the command line of every Hydra program."""
    return get_args_parser()


def combinations(overrides: list[Override]) -> list[list[str]]:
    """The overrides of each job of a sweep over the parsed ``overrides``."""
    [batch] = basic_sweeper.BasicSweeper.split_arguments(overrides, None)
    return batch


def composed(config_dir: Path, config_name: str, overrides: list[str]) -> DictConfig:
    """The result of ``hydra.compose``, which cannot run within a job of Hydra; this can."""
    version.setbase("1.3")
    loader = ConfigLoaderImpl(create_config_search_path(str(config_dir)))
    cfg = loader.load_configuration(config_name, overrides, RunMode.RUN, from_shell=False)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
