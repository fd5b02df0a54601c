"""The cells of a command line, all composed and checked before the first one runs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank_lab.basics import redaction
from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config, hints, spelling
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.sweep import jobs
from lowrank_lab.cells.told import told_apart, words_of
from lowrank_lab.process.garbage import collected_rarely

NAME = "LOWRANK_LAB_GRID"  # variable with the name of a grid, for its processes and their records


def plan(config_dir: Path, config_name: str, overrides: list[str], multirun: bool) -> list[Cell]:
    """One validated cell for each combination of the swept values (one without ``multirun``).

    Raises UserError with one line for anything a user can correct: an unknown option or key, a value out of
    range, a model or data that does not exist.
    """
    overrides = hints.without_globs([config_dir], spelling.spelled_out(overrides))
    with _hydra(config_dir, config_name, overrides):
        if multirun:
            return told_apart([cell_from(cfg, words) for cfg, words in _swept(config_name, overrides)])
        base = compose(config_name, overrides, True)
        redaction.refuse_in(_without_hydra(base))
        _refuse_grid(base, overrides)
        return [cell_of(base, overrides)]


def plan_with(config_dir: Path, overrides: list[str], nodes: Mapping[str, Any]) -> Cell:
    """The validated cell of ``overrides``, with some nodes of its configuration replaced by plain data.

    Raises UserError as ``plan`` does.
    """
    overrides = spelling.spelled_out(overrides)
    with _hydra(config_dir, "config", overrides):
        plain = _without_hydra(compose("config", overrides, True))
        redaction.refuse_in(plain)
        cfg = OmegaConf.create(plain)
        for name, node in nodes.items():
            OmegaConf.update(cfg, name, node, merge=False, force_add=True)
        return cell_from(cfg, overrides)


def configurations(config_dir: Path, config_name: str, overrides: list[str]) -> list[DictConfig]:
    """The configuration of each cell of a grid, whose models and data need not be there.

    Raises UserError for an unknown option or key.
    """
    with _hydra(config_dir, config_name, overrides):
        return [cfg for cfg, _ in _swept(config_name, overrides)]


@contextmanager
def _hydra(config_dir: Path, config_name: str, overrides: list[str]) -> Iterator[None]:
    """Hydra on the options in ``config_dir``, whose errors are UserErrors of one line."""

    _refuse_no_names(config_dir, overrides)

    def composed(some: list[str]) -> DictConfig:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            return compose(config_name, _without_sweeps(some), True)

    try:
        with collected_rarely(), initialize_config_dir(str(config_dir), version_base="1.3"):
            yield
    except UserError as error:
        raise UserError(_in_one_line(hints.amended(str(error), overrides))) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_in_one_line(hints.one_line(error, config_dir, overrides, composed))) from None
    finally:
        GlobalHydra.instance().clear()


def _in_one_line(message: str) -> str:
    """A message that shows a value with line ends in it."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def _swept(config_name: str, overrides: list[str]) -> Iterator[tuple[DictConfig, list[str]]]:
    """The configuration of each combination of the swept values, and the overrides that make it."""
    base = compose(config_name, _without_sweeps(overrides), True)
    params, also = config.plain(_params(base)), config.plain(base.hydra.sweeper.get("also") or [])
    redaction.refuse([f"{key}={value}" for key, value in params.items()] + overrides)
    words = jobs(params, also, overrides)
    yield from zip(_composed(config_name, words, base), words, strict=True)


def _refuse_no_names(config_dir: Path, overrides: list[str]) -> None:
    """Raises UserError for an axis whose options are no names, on which Hydra fails."""
    for word in overrides:
        if not spelling.is_parsed(word) or "glob(" in word:
            continue
        override = OverridesParser.create().parse_override(word)
        value = override.value()
        is_axis = (config_dir / override.key_or_group).is_dir() and override.key_or_group
        if is_axis and isinstance(value, list) and not all(isinstance(option, str) for option in value):
            raise UserError(f"{word}: the options of {override.key_or_group} are names, as --help lists them")


def _params(cfg: DictConfig) -> DictConfig:
    """The values that an experiment sweeps, by setting."""
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or OmegaConf.create({})
    if not OmegaConf.is_dict(params):
        raise UserError(f"hydra.sweeper.params={params} is not valid; it must be values by setting")
    return params


def _refuse_grid(cfg: DictConfig, overrides: list[str]) -> None:
    """Raises UserError where an experiment is a grid, and the one cell of ``overrides`` would be another one."""
    if not (swept := [str(key) for key in _params(cfg)]):
        return
    given = {override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)}
    if missing := [key for key in swept if key not in given]:
        name = cfg.hydra.runtime.choices.get("experiment")
        raise UserError(f"experiment={name} is a grid (over {', '.join(missing)}); add -m")


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


def cell_of(cfg: DictConfig, overrides: list[str]) -> Cell:
    """The cell of a composed configuration, Hydra's part included. Raises UserError as ``plan`` does."""
    return cell_from(OmegaConf.create(_without_hydra(cfg)), overrides)


def cell_from(cfg: DictConfig, overrides: list[str]) -> Cell:
    """The cell of a configuration that ``overrides`` have made; its label tells some of them."""
    cell, words = Cell.from_config(cfg), words_of(overrides)
    return replace(cell, words={**words, "dtype": cell.cfg.dtype} if "dtype" in words else words)  # not auto


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
