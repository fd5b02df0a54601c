"""config.json of a compressed model, which transformers alone must refuse. No torch.

transformers would skip a quantization that it does not know, and draw the weights that it then lacks at random. So
the file names a type of model that it does not know either, and the code beside it that knows it; and it does not
name the quantization, without which every class of transformers refuses the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "lowrank_lab"  # of a compressed model, and the name of its quantization
WITH_CODE = "lowrank_lab_with_code"  # the type where the dense model has code of its own
CODE = "modeling_lowrank_lab"  # the file with its code, and its class of configurations:
CONFIG_CLASS = "CompressedConfig"
CARD = "README.md"  # the model card, beside it
ORIGINAL = ("model_type", "auto_map")  # what is kept of the dense model, as original_…


def guarded(config: Mapping[str, Any], known: bool, has_code: bool) -> dict[str, Any]:
    """The config.json of ``config``, whose ``quantization_config`` is ours.

    ``known``: transformers knows the dense model; ``has_code``: CODE is beside the file.
    """
    quantization = {name: value for name, value in config["quantization_config"].items() if name != "quant_method"}
    quantization |= {f"original_{name}": config[name] for name in ORIGINAL if name in config}
    model_type = MODEL_TYPE if known else WITH_CODE
    changed = {**config, "model_type": model_type, "quantization_config": quantization}
    changed.pop("auto_map", None)
    if has_code:
        changed["auto_map"] = {"AutoConfig": f"{CODE}.{CONFIG_CLASS}"}
    return changed


def unguarded(config: Mapping[str, Any], quant_method: str = MODEL_TYPE) -> dict[str, Any]:
    """The configuration that ``guarded`` was given; any other one is unchanged.

    Raises ValueError for a damaged one.
    """
    if config.get("model_type") not in (MODEL_TYPE, WITH_CODE):
        return dict(config)
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or "original_model_type" not in found:
        raise ValueError("its config.json does not say which model was compressed")
    quantization = {**found, "quant_method": quant_method}
    changed = {name: value for name, value in config.items() if name != "auto_map"}
    changed |= {name: quantization.pop(f"original_{name}") for name in ORIGINAL if f"original_{name}" in found}
    return {**changed, "quantization_config": quantization}
