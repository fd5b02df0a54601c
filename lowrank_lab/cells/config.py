"""Hydra configs: building objects from them, checking them, and the plain data that keys are made of."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lowrank_lab.basics.checks import SEED_IN_WORDS, is_count, is_number, is_seed
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.cells import paths, schema
from lowrank_lab.cells.moved import original_target
from lowrank_lab.models.origin import DTYPES

AUTO = "auto"  # a dtype: that of the model's own weights


def build(node: Any) -> Any:
    """The object that a config node with a ``_target_`` describes. The only instantiate of the project."""
    return instantiate(node, _convert_="all")


def plain(node: Any) -> Any:
    """A config node as plain data with everything resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def for_key(node: Any, without: tuple[str, ...] = ()) -> Any:
    """A config node as plain data for a key, with whole numbers as floats (1 and 1.0 are equal).

    ``without`` names entries of the node that change its speed but no number.
    """
    node = plain(node)
    if isinstance(node, dict):
        kept = {name: for_key(value) for name, value in node.items() if name not in without}
        return {**kept, "_target_": original_target(kept["_target_"])} if "_target_" in kept else kept
    if isinstance(node, list):
        return [for_key(value) for value in node]
    return float(node) if is_number(node) and float(node) == node else node  # not a seed that no float equals


def with_save(cfg: DictConfig) -> DictConfig:
    """``cfg`` with ``save: true`` written as ``save.checkpoint: true``; an experiment's YAML may have either."""
    if isinstance(cfg.save, bool):
        cfg = cfg.copy()
        cfg.save = {"checkpoint": cfg.save, "merge": False, "dtype": AUTO}
    return cfg


def with_chosen_evaluators(cfg: DictConfig) -> DictConfig:
    """``cfg`` without an experiment's settings of evaluators that ``eval=`` on the command line does not choose."""
    if not OmegaConf.is_dict(cfg.get("eval")):
        return cfg
    not_chosen = [name for name, node in cfg.eval.items() if OmegaConf.is_dict(node) and "_target_" not in node]
    if not_chosen:
        cfg = cfg.copy()
        for name in not_chosen:
            del cfg.eval[name]
    return cfg


def validated(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the values of ``cfg``; returns the cell's compressions and its evaluators, by name.

    Raises UserError with one line that says which values are valid.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} must be given, for example {missing[0]}=...")
    for group in ("model", "method", "dataset", "calibration", "tracker"):
        _check(group, cfg.get(group), bool(cfg.get(group)), f"one of its options; see {RUN} --help")
    only_saved = cfg.get("eval") == {} and OmegaConf.select(cfg, "save.checkpoint") is True
    _check("eval", cfg.get("eval"), bool(cfg.get("eval")) or only_saved, f"one of its options; see {RUN} --help")
    schema.check(cfg)
    _check("compressions", cfg.compressions, OmegaConf.is_dict(cfg.compressions), "the compressions by name")
    for name, node in cfg.compressions.items():
        if name in cfg:
            check_same(f"compressions.{name}", node, str(name), cfg[name])
    _check_values(cfg)
    _check_texts(cfg)
    has("tracker", build_checked("tracker", cfg.tracker), "track_existing")
    compressions = build_all(cfg.compressions)
    for name, compression in compressions.items():
        has(name, compression, "check_settings")
    for compression in compressions.values():
        compression.check_settings(cfg)
    evaluators = {str(name): build_checked(f"eval.{name}", node) for name, node in cfg.eval.items()}
    for name, evaluator in evaluators.items():
        has(f"eval.{name}", evaluator, "models")
    schema.check_finite(cfg)
    return compressions, evaluators


def build_all(nodes: DictConfig) -> dict[str, Any]:
    """The objects that ``nodes`` describe, by name, without None. Raises UserError for a wrong value."""
    found = {str(name): build_checked(str(name), node) for name, node in nodes.items() if node is not None}
    return {name: one for name, one in found.items() if one is not None}


def _check_values(cfg: DictConfig) -> None:
    ratio = cfg.ratio
    valid = is_number(ratio) and 0 < ratio <= 1
    _check("ratio", ratio, valid, f"a number in (0, 1]: the fraction kept{_percent(ratio)}")
    _one_of("dtype", cfg.dtype, (*DTYPES, AUTO))
    _check("seed", cfg.seed, is_seed(cfg.seed), SEED_IN_WORDS)
    known_device = isinstance(cfg.device, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", cfg.device)
    _check("device", cfg.device, bool(known_device), "auto, cpu, cuda or cuda:N")
    _check("dry_run", cfg.dry_run, isinstance(cfg.dry_run, bool), "true or false")
    _check("save", cfg.save, OmegaConf.is_dict(cfg.save), "true or false")
    for name in ("checkpoint", "merge"):
        valid = isinstance(cfg.save.get(name), bool)
        _check("save" if name == "checkpoint" else f"save.{name}", cfg.save.get(name), valid, "true or false")
    _one_of("save.dtype", cfg.save.dtype, (AUTO, *DTYPES))
    for name in ("results", "artifacts"):
        valid = isinstance(cfg[name], str) and cfg[name].strip() != "" and "\0" not in cfg[name]
        _check(name, cfg[name], valid, "a folder")
        _check_writable(name, Path(paths.expanded(cfg[name])))
    _check("model.path", cfg.model.path, isinstance(cfg.model.path, str), "a hub name, a folder or package:NAME")
    _check("data_root", cfg.data_root, isinstance(cfg.data_root, str | None), "a folder, or null for the hub")


def _percent(ratio: Any) -> str:
    """How a percentage is written as a ratio; "" for what is none."""
    digits = re.fullmatch(r"(\d+(?:\.\d+)?) ?%?", str(ratio))
    percent = float(digits[1]) if digits else 0.0
    return f"; {percent:g} % is ratio={percent / 100:g}" if 5 <= percent <= 100 else ""


def _check_texts(cfg: DictConfig) -> None:
    check_windows("calibration", cfg.calibration)
    batch_size = cfg.calibration.batch_size
    _check("calibration.batch_size", batch_size, is_count(batch_size, 1), "a whole number from 1")
    offload = cfg.calibration.offload
    _check("calibration.offload", offload, isinstance(offload, bool), "true or false")
    check_part("dataset", cfg.dataset, "eval")
    for name, node in cfg.eval.items():
        if node.get("dataset") is not None:
            check_part(f"eval.{name}.dataset", node.dataset, "eval")
    check_part("calibration.dataset", cfg.calibration.dataset, "calibration")


def build_checked(name: str, node: DictConfig) -> Any:
    """The object that ``node`` describes. Raises UserError, named as on the command line, for a wrong value."""
    try:
        return build(node)
    except Exception as error:  # instantiate wraps the error that the class raised
        if found := re.search(r"full_key: compressions\.lowrank\.(\w+)", str(error)):
            name = found[1]  # on the command line each part of a method is a node
        # hydra names a class that cannot be imported on one line, and the cause on the next
        message = str(error.__cause__ or error).replace(":\n", ": ")
        raise UserError(f"{name}: {message}".splitlines()[0]) from None


def has(name: str, built: Any, attribute: str) -> None:
    """Raise UserError where the class that ``name`` names is one of another axis, or none of lowrank_lab's."""
    if not hasattr(built, attribute):
        raise UserError(f"{name} names a class of another kind (it has no {attribute}); choose one of its options")


def check_same(name: str, value: Any, setting: str, wanted: Any) -> None:
    """Raise UserError where ``name`` differs from the ``setting`` on which the keys of the cell depend."""
    if plain(value) != plain(wanted):
        raise UserError(f"{name} is not set by itself; choose it with {setting}=...")


def _check_writable(name: str, folder: Path) -> None:
    """Raises UserError where nothing can be written below ``folder``, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name}={folder}: {existing} cannot be written to; choose another folder with {name}=...")


def check_windows(name: str, sampling: DictConfig) -> None:
    """Raise UserError for settings of ``name`` that are not valid for windows of a text."""
    _check(f"{name}.seed", sampling.seed, is_seed(sampling.seed), SEED_IN_WORDS)
    for setting, smallest in (("samples", 1), ("seqlen", 2)):
        valid = is_count(sampling[setting], smallest)
        _check(f"{name}.{setting}", sampling[setting], valid, f"a whole number from {smallest}")
    _one_of(f"{name}.sampling", sampling.sampling, ("random", "disjoint"))
    _one_of(f"{name}.bos", sampling.bos, ("text", "window"))
    _check(f"{name}.dataset", sampling.dataset, sampling.dataset is not None, "a data set")


def check_part(name: str, dataset: DictConfig, part: str) -> None:
    """Raise UserError where the data set ``name`` has no such part, or its number of documents is not valid."""
    if dataset[part] is None:
        raise UserError(f"{name}={dataset.name} is not valid; this data set has no {part} part, choose another")
    limit = dataset[part].max_documents
    valid = limit is None or is_count(limit, 1)
    _check(f"{name}.{part}.max_documents", limit, valid, "null or a whole number from 1")


def _check(name: str, value: Any, valid: bool, wanted: str) -> None:
    if not valid:
        raise UserError(f"{name}={value} is not valid; it must be {wanted}")


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    _check(name, value, value in options, " or ".join(options))
