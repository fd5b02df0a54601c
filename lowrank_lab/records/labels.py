"""The entries of a record for tables: the cell's settings, and those in which it differs from its method.

Tables compare these entries, so they need neither the classes nor the YAML of the settings. No torch.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from lowrank_lab.basics.paths import CONF
from lowrank_lab.basics.redaction import redacted_settings
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.hydra_private import composed
from lowrank_lab.cells.options import names
from lowrank_lab.cells.settings import ANSWERS, flattened
from lowrank_lab.cells.told import told

SETTING_OF = {"lowrank": "allocation"}  # the setting that is "none" without a compression, if not its own
OLD_COMPRESSIONS = ("lowrank", "quantization")  # of records that do not list their compressions
COMMON = ("dtype", "calibration", "seed")  # settings that do not belong to a method


def labels(cell: Cell) -> dict[str, Any]:
    """The entries of a record that describe its cell for tables, without secrets.

    quantization  ``name``, and ``family``: the name without the formats of the weights; "none" where there is none
    counts        ``unit``: what the ratio is a fraction of, in a few words; ``whole``: whether of all linears
    settings      those that may differ between two cells of one method, flat, by their names on the command line
    variant       those of ``settings`` in which the cell differs from the YAML file of its method
    """
    plain = redacted_settings(config.plain(cell.cfg))
    factors = any(one.makes_factors for one in cell.compressions.values())
    of_compressions = {name: one.settings(plain) for name, one in cell.compressions.items()}
    of_cell = settings(plain, of_compressions, calibrated=cell.calibration_data is not None)
    typed = {axis: cell.words[axis] for axis in ANSWERS if axis in of_cell and axis in cell.words}
    of_cell |= {axis: option for axis, option in typed.items() if option not in names(axis)}  # somebody's own
    quantization = cell.compressions.get("quantization")
    return {
        "quantization": {
            "name": "none" if quantization is None else quantization.name,
            "family": "none" if quantization is None else quantization.family,
        },
        "counts": counts(plain, cell.site_rules[2].counts if factors else None, bool(cell.compressions)),
        "settings": of_cell,
        "variant": variant(of_cell, of_method(cell.cfg.method.name), told(cell)),
    }


def settings(cfg: dict[str, Any], of_compressions: dict[str, dict[str, Any]], calibrated: bool) -> dict[str, Any]:
    """The ``settings`` of a record from its configuration as plain data, and those of each compression in it.

    ``calibrated``: whether anything reads the calibration text.
    """
    names = ["lowrank", *cfg.get("compressions", OLD_COMPRESSIONS)]
    absent = {name: {SETTING_OF.get(name, name): "none"} for name in names}
    of_all = {**absent, **of_compressions}
    common = {"dtype": cfg["dtype"], **(flattened("calibration", cfg["calibration"]) if calibrated else {})}
    found = {**of_all.pop("lowrank"), **common}
    for of_one in of_all.values():
        found |= of_one
    return found


def counts(cfg: dict[str, Any], stored: str | None, compressed: bool) -> dict[str, Any]:
    """The ``counts`` of a record; ``stored`` is what the storage of factors counts, None without factors.

    ``compressed``: whether anything changed the model; without factors it may have changed a part of it.
    """
    targets = cfg["targets"]
    everything = targets["linears"] == "all"
    of_role = "" if everything else f" of {targets['linears']}"
    if stored is None:
        everything = everything or not compressed
        return {"unit": "weights" if everything else f"weights{of_role}", "whole": everything}
    if targets["ratio_of"] == "kv_cache":
        return {"unit": "cached values", "whole": False}
    in_blocks = f" in blocks {word(targets['blocks'])}" if targets.get("blocks") else ""
    in_tower = f" in the {targets['tower']} tower" if targets.get("tower") else ""
    return {"unit": f"{stored}{of_role}{in_blocks}{in_tower}", "whole": everything and not (in_blocks or in_tower)}


def variant(
    of_cell: dict[str, Any], of_its_method: dict[str, Any] | None, told_in_label: Collection[str] = ()
) -> dict[str, Any]:
    """The settings of a cell that differ from those of its method, where the method has a YAML file.

    Where a part of the method is replaced (another metric, say), the new part is listed with those of its settings
    that the cell's label tells.
    """
    found = {}
    for name, value in of_cell.items():
        answer = name.split(".")[0]
        if answer in COMMON:
            continue
        if of_its_method is not None and (name == answer or of_its_method.get(answer) == of_cell.get(answer)):
            differs = of_its_method.get(name) != value
        else:
            differs = name in told_in_label
        if differs:
            found[name] = value
    return found


@cache
def of_method(method: str) -> dict[str, Any] | None:
    """The settings of a method in its YAML file; None for a method that is not in conf/."""
    if method not in names("method"):
        return None
    cfg = composed(CONF, "config", [f"method={method}"])
    plain = config.plain(cfg)
    compressions = config.build_all(cfg.compressions)
    return settings(plain, {name: one.settings(plain) for name, one in compressions.items()}, calibrated=False)


def word(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
