"""What a record says of its cell for tables: its settings, and in which of them the cell differs from its method.

Tables compare these entries, and need neither the classes nor the YAML that the settings came from. No torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.hydra_private import composed
from lowrank_lab.redaction import redacted_settings

ANSWERS = ("metric", "grouping", "targets", "allocation", "refinement", "storage")
CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
# Parts of the settings that a name stands for, or that change no number.
LEFT_OUT = (
    "calibration.dataset.eval",
    "refinement.dataset.eval",
    "refinement.micro_batch",
    "calibration.batch_size",
    "calibration.offload",
)


def labels(cell: Cell) -> dict[str, Any]:
    """The entries of a record that describe its cell to tables, without secrets.

    quantization  ``name``, and ``family``: the name without the formats of the weights; "none" where there is none
    counts        ``unit``: what the ratio is a fraction of, in a few words; ``whole``: whether of all linears
    settings      those that may differ between two cells of one method, flat, by their names on the command line
    variant       those of ``settings`` in which the cell differs from its method as the YAML file has it
    """
    plain = redacted_settings(config.plain(cell.cfg))
    stored = None if cell.cfg.allocation is None else config.build(cell.cfg.storage).counts
    of_cell = settings(
        plain,
        quantization=_name(cell.quantization),
        calibrated=cell.calibration_data is not None,
        seeded=cell.quantization is not None and cell.quantization.needs_seed,
    )
    return {
        "quantization": {
            "name": _name(cell.quantization),
            "family": "none" if cell.quantization is None else cell.quantization.family,
        },
        "counts": counts(plain, stored),
        "settings": of_cell,
        "variant": variant(of_cell, of_method(cell.cfg.method.name)),
    }


def settings(cfg: dict[str, Any], quantization: str, calibrated: bool, seeded: bool) -> dict[str, Any]:
    """The ``settings`` of a record from its configuration as plain data.

    ``calibrated``: whether anything reads the calibration text; ``seeded``: whether the quantization draws random
    numbers.
    """
    flat: dict[str, Any] = {}
    calibration = ["calibration"] if calibrated else []
    if cfg["allocation"] is None:
        flat["allocation"] = "none"
        names = ["dtype", *calibration]
    else:
        names = [*ANSWERS, "dtype", *calibration]
    for name in names:
        _flatten(name, _without_same_text(cfg) if name == "refinement" else cfg[name], flat)
    flat["quantization"] = quantization
    if cfg["quantization"] is not None:
        flat |= {"seed": cfg["seed"]} if seeded else {}
        flat |= _not_in_name(cfg["quantization"])
    return flat


def counts(cfg: dict[str, Any], stored: str | None) -> dict[str, Any]:
    """The ``counts`` of a record; ``stored`` is what the storage of factors counts, None where there is none."""
    targets = cfg["targets"]
    everything = targets["linears"] == "all"
    of_role = "" if everything else f" of {targets['linears']}"
    if stored is None:  # the bits may be those of a part of the model alone
        everything = everything or cfg["quantization"] is None
        return {"unit": "weights" if everything else f"weights{of_role}", "whole": everything}
    if targets["ratio_of"] == "kv_cache":
        return {"unit": "cached values", "whole": False}
    in_blocks = f" in blocks {word(targets['blocks'])}" if targets.get("blocks") else ""
    return {"unit": f"{stored}{of_role}{in_blocks}", "whole": everything and not in_blocks}


def variant(of_cell: dict[str, Any], of_its_method: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of a cell that differ from those of its method; none where the method has no YAML file.

    A setting of another answer than the method's is left out: the answer itself is there.
    """
    if of_its_method is None:
        return {}
    found = {}
    for name, value in of_cell.items():
        answer = name.split(".")[0]
        of_same_answer = name == answer or of_its_method.get(answer) == of_cell.get(answer)
        if answer in (*ANSWERS, "quantization") and of_same_answer and of_its_method.get(name) != value:
            found[name] = value
    return found


@cache
def of_method(method: str) -> dict[str, Any] | None:
    """The settings of a method as its YAML file has them; None for a method that is not in conf/."""
    if method not in {file.stem for file in (CONFIG_DIR / "method").glob("*.yaml")}:
        return None
    cfg = composed(CONFIG_DIR, "config", [f"method={method}"])
    quantization = None if cfg.quantization is None else config.build(cfg.quantization)
    return settings(config.plain(cfg), _name(quantization), calibrated=False, seeded=False)


def word(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def _name(quantization: Any) -> str:
    return "none" if quantization is None else str(quantization.name)


def _without_same_text(cfg: dict[str, Any]) -> Any:
    """The refinement, without its data set where that is the calibration's."""
    refinement = cfg["refinement"]
    if refinement is None or refinement.get("dataset") != cfg["calibration"]["dataset"]:
        return refinement
    return {name: value for name, value in refinement.items() if name != "dataset"}


def _not_in_name(quantization: dict[str, Any]) -> dict[str, Any]:
    """The settings of a quantization that its name does not say."""
    flat = {"quantization.sequential": quantization["sequential"]}
    for weights in ("weights", "left", "right"):
        flat[f"quantization.{weights}.scale_dtype"] = quantization[weights]["scale_dtype"]
    for part in ("transform", "latent", "method", "kv_cache"):
        of_part: dict[str, Any] = {}
        _flatten(f"quantization.{part}", quantization[part], of_part)
        flat |= {name: value for name, value in of_part.items() if name.count(".") > 1}
    return flat


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    """A class stands under the name of its node, its settings below that. A corpus is known by its data set."""
    if not isinstance(value, dict):
        into[name] = value
        return
    for inner_name, inner in value.items():
        if inner_name == "_target_":
            into[name] = str(inner).rpartition(".")[2]
        elif inner_name != "corpus" and f"{name}.{inner_name}" not in LEFT_OUT:
            _flatten(f"{name}.{inner_name}", inner, into)
