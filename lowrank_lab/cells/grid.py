"""The cells of a command line, all composed and checked before the first one runs. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank_lab import redaction
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.hydra_private import combinations
from lowrank_lab.errors import UserError

NAME = "LOWRANK_LAB_GRID"  # variable with the name of a grid, for its processes and their records


def plan(config_dir: Path, config_name: str, overrides: list[str], multirun: bool) -> list[Cell]:
    """One validated cell for each combination of the swept values (one without ``multirun``).

    Raises UserError with one line for anything a user can correct: an unknown option or key, a value out of
    range, a model or data that does not exist.
    """
    overrides = spelled_out(overrides)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            base = compose(config_name, _without_sweeps(overrides) if multirun else overrides, True)
            if not multirun:
                redaction.refuse_in(_without_hydra(base))
                return [cell_of(base)]
            params: DictConfig = base.hydra.sweeper.get("params") or OmegaConf.create({})
            swept = [f"{key!s}={value}" for key, value in params.items()] + overrides
            redaction.refuse(swept)
            parsed = OverridesParser.create().parse_overrides(swept)
            return [Cell.from_config(cfg) for cfg in _composed(config_name, combinations(parsed), base)]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_one_line(error, config_dir)) from None
    finally:
        GlobalHydra.instance().clear()


def spelled_out(words: list[str]) -> list[str]:
    """A command line with ``save=true`` as ``save.checkpoint=true``, and ``eval=a,b`` as ``eval=[a,b]``.

    Hydra cannot have both ``save=true`` and ``save.merge=true``: the first would replace the node of the second,
    and options of a group cannot have the names true and false. And Hydra would read ``eval=a,b`` as a grid, while
    all evaluations of a model belong to one job.
    """
    return [_spelled_out(word) for word in words]


def _spelled_out(word: str) -> str:
    axis, _, value = word.partition("=")
    if axis == "save":
        return f"save.checkpoint={value}"
    if axis == "eval" and re.fullmatch(r"\w+(,\w+)+", value):
        return f"eval=[{value}]"
    return word


def _without_sweeps(overrides: list[str]) -> list[str]:
    """The overrides with the first value of every axis, which is enough to read the sweeper's settings."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    first = []
    for override in parsed:
        if override.is_sweep_override():
            value = str(next(iter(override.sweep_string_iterator())))
            first.append(f"{override.get_key_element()}={value}")
        else:
            first.append(str(override.input_line))
    return first


def cell_of(cfg: DictConfig) -> Cell:
    """The cell of a composed configuration, Hydra's part included. Raises UserError as ``plan`` does."""
    return Cell.from_config(OmegaConf.create(_without_hydra(cfg)))


def _composed(config_name: str, jobs: list[list[str]], base: DictConfig) -> Iterator[DictConfig]:
    """The configuration of each job, a list of words; ``base`` is that of one of them, Hydra's part included.

    Hydra needs a tenth of a second to compose the chosen options, so it does this once for each combination of
    options; values, which are most of a large grid, are then set in copies. A word that is neither option nor
    value depends on its position among the others: then Hydra composes all of them.
    """
    chosen: dict[tuple[str, ...], DictConfig] = {}
    plain: dict[tuple[str, ...], Any] = {}
    parser = OverridesParser.create()
    for words in jobs:
        overrides = parser.parse_overrides(words)
        values = [override for override in overrides if _sets_value(override, base)]
        if all(override in values or _chooses_option(override, base) for override in overrides):
            choices = tuple(word for word, override in zip(words, overrides, strict=True) if override not in values)
        else:
            values, choices = [], tuple(words)
        if choices not in chosen:
            chosen[choices] = compose(config_name, list(choices), True)
            plain[choices] = _without_hydra(chosen[choices])
            redaction.refuse_in(plain[choices])  # a YAML file of the user may hold a secret
        if not all(_sets_value(override, chosen[choices]) for override in values):  # as they did in ``base``
            yield OmegaConf.create(_without_hydra(compose(config_name, words, True)))
            continue
        cfg = OmegaConf.create(plain[choices])
        OmegaConf.set_struct(cfg, True)
        try:
            for override in values:
                OmegaConf.update(cfg, override.key_or_group, override.value())
        except OmegaConfBaseException:
            compose(config_name, words)  # its error says what is wrong
            raise
        OmegaConf.set_struct(cfg, None)
        yield cfg


def _sets_value(override: Override, cfg: DictConfig) -> bool:
    """Whether an override sets an entry of the cell, and is not an option of any group in ``cfg``."""
    key, value = override.key_or_group, override.value()
    if override.type is not OverrideType.CHANGE or override.package is not None or override.is_hydra_override():
        return False
    if "/" in key or key in cfg.hydra.runtime.choices or isinstance(value, dict):
        return False
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return False
    return "." in key or (key in cfg and not OmegaConf.is_dict(cfg._get_node(key)))


def _chooses_option(override: Override, cfg: DictConfig) -> bool:
    """Whether an override chooses an option of a group, or belongs to Hydra's part: not to the cell's entries."""
    if override.is_hydra_override():
        return True
    is_choice = override.key_or_group in cfg.hydra.runtime.choices and not isinstance(override.value(), dict)
    return is_choice and override.type is OverrideType.CHANGE


def _without_hydra(cfg: DictConfig) -> Any:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra")
    return plain


def _one_line(error: Exception, config_dir: Path) -> str:
    """Hydra's error as one line, with the valid options or the nearest key where the name is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0]
    if "Could not load '" in first:
        group, _, option = first.split("Could not load '")[1].partition("'")[0].rpartition("/")
        options = sorted(file.stem for file in (config_dir / group).glob("*.yaml"))
        return f"{group}={option}: no such option; choose among {', '.join(options)}"
    if "Could not find '" in first:
        group, _, option = first.split("Could not find '")[1].rstrip("'").rpartition("/")
        options = lines[2 : lines.index("Config search path:")] if "Config search path:" in lines else []
        return f"{group}={option}: no such option; choose one of {', '.join(options)}"
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
        if "." in key:
            return (
                f"{key}: no such setting with these options (see them with: python run.py ... --cfg job); "
                f"an entry that is new begins with +"
            )
        axis, _, part = key.partition("/")
        if part and (config_dir / axis / part).is_dir():
            return f"{key}: choose an option of {axis} as well ({axis}=...; --help lists them)"
        axes = [folder.name for folder in config_dir.iterdir() if folder.is_dir()]
        text = (config_dir / "config.yaml").read_text(encoding="utf-8")
        settings = [line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()]
        near = difflib.get_close_matches(key, axes + settings, n=1)
        hint = f"did you mean {near[0]}?" if near else "python run.py --help lists the axes"
        return f"{key}: no such setting; {hint}"
    if first.startswith("Ambiguous value"):
        return f"{first.removesuffix('.')}: to run several values as a grid, add -m"
    if "parsing override" in first or "input" in first:
        return f"{' '.join(lines[:2])}; write key=value, and quote values with special characters: 'key=\"a b\"'"
    return " ".join(lines)
