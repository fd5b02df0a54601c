"""Settings as one level, by their names on the command line: what may tell two cells of one method apart. No torch.

They are made of plain data alone, so that records of any age can be described without the classes that they name.
"""

from __future__ import annotations

from typing import Any

ANSWERS = ("metric", "grouping", "targets", "allocation", "refinement", "storage")
# Parts that a name stands for, or that change no number.
EXCLUDED = (
    "calibration.dataset.eval",
    "refinement.dataset.eval",
    "refinement.micro_batch",
    "calibration.batch_size",
    "calibration.offload",
)


def flattened(name: str, value: Any) -> dict[str, Any]:
    """The settings of a node ``name``, which is plain data.

    A class stands under the name of its node, its settings below that. A corpus is known by its data set.
    """
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for inner_name, inner in value.items():
        if inner_name == "_target_":
            found[name] = str(inner).rpartition(".")[2]
        elif inner_name != "corpus" and f"{name}.{inner_name}" not in EXCLUDED:
            found |= flattened(f"{name}.{inner_name}", inner)
    return found


def lowrank_settings(cfg: dict[str, Any]) -> dict[str, Any]:
    """Those of a low-rank method's answers. A refinement on the calibration text names no data set of its own."""
    refinement = cfg["refinement"]
    if refinement is not None and refinement.get("dataset") == cfg["calibration"]["dataset"]:
        refinement = {name: value for name, value in refinement.items() if name != "dataset"}
    found: dict[str, Any] = {}
    for name in ANSWERS:
        found |= flattened(name, refinement if name == "refinement" else cfg[name])
    return found


def quantization_settings(cfg: dict[str, Any], name: str, seeded: bool) -> dict[str, Any]:
    """The ``name`` of a quantization and what it does not say; the seed where it draws random numbers."""
    node = cfg["quantization"]
    found = {"quantization": name, **({"seed": cfg["seed"]} if seeded else {})}
    found["quantization.sequential"] = node["sequential"]
    for weights in ("weights", "left", "right"):
        found[f"quantization.{weights}.scale_dtype"] = node[weights]["scale_dtype"]
    for part in ("transform", "latent", "method", "kv_cache"):
        of_part = flattened(f"quantization.{part}", node[part])
        found |= {name: value for name, value in of_part.items() if name.count(".") > 1}
    return found
