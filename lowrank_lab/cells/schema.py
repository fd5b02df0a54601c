"""Which entries a configuration has, and of what kind: checked before anything is built from them. No torch.

Values that one class alone reads are checked by that class (lowrank_lab/basics/checks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN

ENTRIES = ("ratio", "sparsity", "seed", "device", "dtype", "dry_run", "data_root", "save", "results", "artifacts")
OF_NODES = {
    "model": ("path", "revision", "trust_remote_code"),
    "method": ("name",),
    "calibration": ("dataset", "samples", "seqlen", "seed", "sampling", "bos", "batch_size", "offload"),
    "save": ("checkpoint", "merge", "dtype"),
}
AXES = ("metric", "grouping", "targets", "allocation", "refinement", "storage", "pruning", "quantization", "tokens")
OF_QUANTIZATION = ("transform", "latent", "method", "activations", "kv_cache")
PART = ("split", "join", "max_documents")


def check(cfg: DictConfig) -> None:
    """Raise UserError for an entry that is missing, or of another kind than cells need."""
    for name in (*ENTRIES, *AXES, *OF_NODES, "dataset", "tracker", "eval", "compressions"):
        _present(cfg, name, name)
    for node, names in OF_NODES.items():
        _is_node(node, cfg[node])
        for name in names:
            _present(cfg[node], name, f"{node}.{name}")
        _no_others(node, cfg[node], names)
    _check_names(cfg)
    for name in (*AXES, "tracker"):
        _is_built(name, cfg[name], optional=True)
    for name in OF_QUANTIZATION if cfg.quantization is not None else ():
        if name in cfg.quantization:
            _is_built(f"quantization.{name}", cfg.quantization[name], optional=True)
    _is_node("eval", cfg.eval)
    for name, node in cfg.eval.items():
        _is_built(f"eval.{name}", node)
        if node.get("dataset") is not None:
            _check_dataset(f"eval.{name}.dataset", node.dataset)
    _check_dataset("dataset", cfg.dataset)
    for name in ("calibration", "refinement"):
        if cfg[name] is not None and cfg[name].get("dataset") is not None:
            _check_dataset(f"{name}.dataset", cfg[name].dataset)
    for name, value in _values("", OmegaConf.to_container(cfg)):
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{name} has a character of code 0; leave it out")


def check_finite(cfg: DictConfig) -> None:
    """Raise UserError for a number that no float holds: keys and records are JSON."""
    for name, value in _values("", OmegaConf.to_container(cfg)):
        is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_one and not checks.is_number(value):
            shown = value if isinstance(value, float) else f"{str(value)[:10]}..."
            raise UserError(f"{name}={shown} is not valid; it must be a finite number")


def _check_names(cfg: DictConfig) -> None:
    _is_name("method.name", cfg.method.name)
    _is_text("model.revision", cfg.model.revision, optional=True)
    trusted = cfg.model.trust_remote_code
    _require("model.trust_remote_code", trusted, isinstance(trusted, bool), "true or false")
    sparsity = cfg.sparsity
    valid = checks.is_number(sparsity) and 0 <= sparsity < 1
    _require("sparsity", sparsity, valid, "a number in [0, 1): the fraction of zeros")


def _check_dataset(name: str, node: Any) -> None:
    _is_node(name, node)
    for entry in ("name", "corpus", "eval", "calibration"):
        _present(node, entry, f"{name}.{entry}")
    _is_name(f"{name}.name", node.name)
    _is_built(f"{name}.corpus", node.corpus)
    for part in ("eval", "calibration"):
        if node[part] is not None:
            _check_part(f"{name}.{part}", node[part])


def _check_part(name: str, node: Any) -> None:
    _is_node(name, node)
    for entry in PART:
        _present(node, entry, f"{name}.{entry}")
    _no_others(name, node, PART)
    _is_name(f"{name}.split", node.split)
    _is_text(f"{name}.join", node.join)


def _present(node: DictConfig, entry: str, name: str) -> None:
    if entry not in node:
        raise UserError(f"{name} is missing; every cell needs it, so leave ~{name} out")


def _no_others(name: str, node: DictConfig, known: tuple[str, ...]) -> None:
    for entry in node:
        if entry not in known:
            raise UserError(f"{name}.{entry!s}: no such setting; {name} has {', '.join(known)}")


def _is_node(name: str, value: Any) -> None:
    _require(name, value, OmegaConf.is_dict(value), "one of its options, or settings as in {a: 1}")


def _is_built(name: str, value: Any, optional: bool = False) -> None:
    """Check that a class is named for ``value``."""
    if optional and value is None:
        return
    _is_node(name, value)
    if not isinstance(value.get("_target_"), str):
        raise UserError(f"{name} names no class (_target_); choose one of its options, see {RUN} --help")
    if "_partial_" in value:
        raise UserError(f"{name}._partial_: no such setting; leave it out")


def _is_name(name: str, value: Any) -> None:
    _is_text(name, value)
    _require(name, repr(value), value.strip() != "", "a name")


def _is_text(name: str, value: Any, optional: bool = False) -> None:
    valid = isinstance(value, str) or (optional and value is None)
    _require(name, value, valid, f"{'null or ' if optional else ''}text; quote what looks like a number")


def _require(name: str, value: Any, valid: bool, wanted: str) -> None:
    if not valid:
        raise UserError(f"{name}={_short(value)} is not valid; it must be {wanted}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _values(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """All values that are no node or list, by their names on the command line."""
    if isinstance(node, dict):
        for entry, value in node.items():
            yield from _values(f"{name}.{entry}" if name else str(entry), value)
    elif isinstance(node, list):
        for value in node:
            yield from _values(name, value)
    else:
        yield name, node
