"""Settings in which two cells of one method may differ, flat, by their names on the command line. No torch.

They come from plain data alone, so that old records can be described without the classes that they name.
"""

from __future__ import annotations

from typing import Any

from lowrank_lab.cells.options import name_of

ANSWERS = ("metric", "grouping", "targets", "allocation", "refinement", "storage")
# Settings that a name already says, or that change no number.
EXCLUDED = (
    "calibration.dataset.eval",
    "refinement.dataset.eval",
    "refinement.micro_batch",
    "calibration.batch_size",
    "calibration.offload",
)


def flattened(name: str, value: Any) -> dict[str, Any]:
    """The settings of a node ``name``, which is plain data.

    The value of a node is the name of its option, or its class where it is no axis; its settings follow below it.
    The name of a data set says its corpus.
    """
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for inner_name, inner in value.items():
        if inner_name == "_target_":
            found[name] = name_of(name, value) if name in ANSWERS else str(inner).rpartition(".")[2]
        elif inner_name != "corpus" and f"{name}.{inner_name}" not in EXCLUDED:
            found |= flattened(f"{name}.{inner_name}", inner)
    return found


def lowrank_settings(cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings of a low-rank method. A refinement that reads the calibration text has no data set here."""
    refinement = cfg["refinement"]
    if refinement is not None and refinement.get("dataset") == cfg["calibration"]["dataset"]:
        refinement = {name: value for name, value in refinement.items() if name != "dataset"}
    found: dict[str, Any] = {}
    for name in ANSWERS:
        found |= flattened(name, refinement if name == "refinement" else cfg[name])
    return found


def quantization_settings(cfg: dict[str, Any], name: str, seeded: bool) -> dict[str, Any]:
    """The ``name`` of a quantization and its settings that the name lacks; the seed if it draws random numbers."""
    node = cfg["quantization"]
    found = {"quantization": name, **({"seed": cfg["seed"]} if seeded else {})}
    found["quantization.sequential"] = node["sequential"]
    for weights in ("weights", "left", "right"):
        found[f"quantization.{weights}.scale_dtype"] = node[weights]["scale_dtype"]
    for part in ("transform", "latent", "method", "kv_cache"):
        of_part = flattened(f"quantization.{part}", node[part])
        found |= {name: value for name, value in of_part.items() if name.count(".") > 1}
    return found
