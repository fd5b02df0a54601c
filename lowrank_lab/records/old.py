"""Old records, which do not have the entries that labels.py writes today.

This derives the entries from the record's configuration as plain data. It imports and runs nothing that a record
names, because a record may come from another person. For an old cell it is not known which settings differ from
its method, except for the quantization, which no method has.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lowrank_lab.cells.options import name_of
from lowrank_lab.cells.settings import ANSWERS, lowrank_settings, quantization_settings
from lowrank_lab.modules.formats import Format
from lowrank_lab.records import labels

WITH_SEED = ("QuaRot", "SpinQuant", "DuQuant")  # classes whose results depend on the seed


def with_labels(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the entries of ``labels.labels``; unchanged where it has them.

    Where parts of the configuration are missing, as in outdated schemas, the entries stay empty.
    """
    if "settings" in record:
        return _with_option_names(_with_act_order(record))
    cfg, name = record["config"], _name(record)
    record = {
        **record,
        "quantization": {"name": name, "family": name},
        "counts": {"unit": "unknown", "whole": False},
        "settings": {},
        "variant": {} if name == "none" else {"quantization": name},
    }
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        record["quantization"]["family"] = _family(cfg["quantization"], name)
        stored = None if cfg["allocation"] is None else _stored(cfg["storage"])
        record["counts"] = labels.counts(cfg, stored, cfg["quantization"] is not None)
        record["settings"] = labels.settings(cfg, _of_compressions(cfg, name), "calibration" in record)
    return record


def _with_act_order(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the name that GPTQ with act-order has today; it had that of GPTQ without."""
    act_order: Any = record["config"]
    for name in ("quantization", "method", "act_order"):
        act_order = act_order.get(name) if isinstance(act_order, dict) else None
    names = record.get("quantization", {"name": ""})
    if act_order is not True or "GPTQ-R" in names["name"]:
        return record
    found = {**record, "quantization": {of: name.replace("GPTQ", "GPTQ-R") for of, name in names.items()}}
    for entry in ("settings", "variant"):
        if "quantization" in record.get(entry, {}):
            renamed = str(record[entry]["quantization"]).replace("GPTQ", "GPTQ-R")
            found[entry] = {**record[entry], "quantization": renamed}
    return found


def _with_option_names(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the names of options where it has those of classes."""
    named = {
        axis: name_of(axis, record["config"].get(axis))
        for axis in ANSWERS
        if axis in record["settings"] and record["settings"][axis] == _class(record["config"].get(axis))
    }
    if not named:
        return record
    in_variant = {axis: name for axis, name in named.items() if axis in record["variant"]}
    return {**record, "settings": record["settings"] | named, "variant": record["variant"] | in_variant}


def _of_compressions(cfg: dict[str, Any], quantization: str) -> dict[str, dict[str, Any]]:
    """The settings of each compression; ``quantization`` is the name of the quantization."""
    found = {} if cfg["allocation"] is None else {"lowrank": lowrank_settings(cfg)}
    if cfg["quantization"] is not None:
        seeded = any(_class(part) in WITH_SEED for part in cfg["quantization"].values())
        found["quantization"] = quantization_settings(cfg, quantization, seeded)
    return found


def _name(record: dict[str, Any]) -> str:
    """The name of a record's quantization: in its label it is between the ratio and the model."""
    if not isinstance(record["config"], dict) or record["config"].get("quantization") is None:
        return "none"
    text = str(record["label"]).removeprefix(str(record["method"]))
    with suppress(TypeError, ValueError):
        text = text.removeprefix(f" ratio={record['ratio']:g}")
    return text.removesuffix(f" {record['model']} {record['dataset']}").strip()


def _family(quantization: dict[str, Any] | None, name: str) -> str:
    """The name without the formats of the weights."""
    if quantization is None or quantization["method"] is None:
        return name
    weights, left, right = (Format(**quantization[of]).name for of in ("weights", "left", "right"))
    formats = weights if weights == left == right else f"{weights} ({left}·{right})"
    before, _, after = name.partition(formats)
    if _class(quantization["method"]) == "RoundToNearest":
        before += "RTN"
    return " ".join(f"{before} {after}".split())


def _stored(storage: dict[str, Any]) -> str:
    return "16-bit words" if _class(storage) == "Remap" else "weights"


def _class(node: Any) -> str:
    """The name of the class that a node describes; "" where it describes none."""
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""
