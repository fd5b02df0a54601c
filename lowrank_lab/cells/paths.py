"""The paths of a configuration: ``~`` is the home folder in all of them, wherever they come from. No torch."""

from __future__ import annotations

import os

from omegaconf import DictConfig, OmegaConf

from lowrank_lab.basics.errors import UserError

PATHS = ("results", "artifacts", "data_root", "model.path")


def expanded(path: str) -> str:
    """``path`` with ~ or ~user at its beginning replaced. Raises UserError where there is no such home folder."""
    found = os.path.expanduser(path)
    if found.startswith("~") and found == path:
        home = path.partition("/")[0]
        raise UserError(f"{path}: there is no home folder {home}; write ./{path} for a folder here")
    return found


def expand(cfg: DictConfig) -> None:
    """Replace ~ in the paths of ``cfg`` in place. An empty ``data_root``, as LOWRANK_LAB_DATA may be, is none."""
    for name in PATHS:
        value = OmegaConf.select(cfg, name)
        if isinstance(value, str):
            OmegaConf.update(cfg, name, expanded(value))
    if isinstance(cfg.data_root, str) and not cfg.data_root.strip():
        cfg.data_root = None


# For the folders of Hydra's own, which it makes before any cell is looked at.
OmegaConf.register_new_resolver("expanded", lambda path: os.path.expanduser(str(path)), replace=True)
