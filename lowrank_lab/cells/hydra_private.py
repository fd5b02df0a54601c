"""All uses of Hydra's private parts. A new version of Hydra may break this file, and no other."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import basic_launcher, basic_sweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

# The modules, not their classes: Hydra runs both once more when it looks for plugins, and then has other classes.
__all__ = ["argument_parser", "basic_launcher", "basic_sweeper", "combinations", "composed", "hide_private_options"]


def hide_private_options() -> None:
    """Do not offer options whose names begin with _ in help, completions and globs; others may include them."""
    of_group = ConfigLoaderImpl.get_group_options

    def offered(*arguments: Any, **settings: Any) -> list[str]:
        return [option for option in of_group(*arguments, **settings) if not option.startswith("_")]

    ConfigLoaderImpl.get_group_options = offered


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
