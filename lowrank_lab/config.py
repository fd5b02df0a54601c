"""Hydra configs: building objects from them, checking them, and the plain data that keys are made of."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lowrank_lab.errors import UserError

# Settings that change the speed of a run but not its numbers. They never enter a key.
NOT_IN_KEYS = frozenset({"batch_size"})
DTYPES = ("float32", "bfloat16", "float16")


def build(node: Any) -> Any:
    """The object that a config node with a ``_target_`` describes. The only instantiate of the project."""
    return instantiate(node, _convert_="all")


def plain(node: Any) -> Any:
    """A config node as plain data with everything resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def for_key(node: Any) -> Any:
    """A config node as the data a key is made of: plain, without what changes no number."""
    node = plain(node)
    if isinstance(node, dict):
        return {name: for_key(value) for name, value in node.items() if name not in NOT_IN_KEYS}
    if isinstance(node, list):
        return [for_key(value) for value in node]
    return node


def validate(cfg: DictConfig) -> None:
    """Check values that YAML cannot. Raises UserError with one line that says what would be right."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} must be given, for example {missing[0]}=...")
    _check(
        "ratio",
        cfg.ratio,
        _is_number(cfg.ratio) and 0 < cfg.ratio <= 1,
        "a number in (0, 1]: the fraction kept",
    )
    _check("dtype", cfg.dtype, cfg.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
    _check("seed", cfg.seed, _is_count(cfg.seed, 0), "a whole number from 0")
    _check(
        "model.path", cfg.model.path, isinstance(cfg.model.path, str), "a hub name, a folder or package:NAME"
    )
    for name in ("samples", "seqlen", "batch_size"):
        value = cfg.calibration[name]
        _check(f"calibration.{name}", value, _is_count(value, 1), "a whole number from 1")
    sampling = cfg.calibration.sampling
    _check("calibration.sampling", sampling, sampling in ("random", "disjoint"), "random or disjoint")
    if not cfg.eval:
        raise UserError("no evaluator is chosen; give for example eval=ppl")
    for name, node in cfg.eval.items():
        try:
            build(node)
        except Exception as error:  # instantiate wraps whatever the evaluator raised for a bad value
            raise UserError(f"eval.{name}: {error.__cause__ or error}") from None


def _check(name: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        raise UserError(f"{name}={value} is not valid; it must be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, smallest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest
