"""The configuration of a compressed model: that of the dense model, and how it was compressed."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from lowrank_lab.models.own_config import MODEL_TYPE, unguarded


class CompressedConfig(PreTrainedConfig):
    """Reads config.json of a compressed model.

    What it gives is a configuration of the dense model's own class, so that transformers builds the dense model,
    and the quantizer that ``quant_method`` names then changes it.
    """

    model_type = MODEL_TYPE
    quant_method: ClassVar[str] = MODEL_TYPE
    is_trusted: ClassVar[bool] = False  # the code beside a checkpoint is, where it runs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **rest: Any) -> Any:
        """That of transformers would warn of a type of model that is not this class's."""
        config, rest = cls.get_config_dict(pretrained_model_name_or_path, **rest)
        return cls.from_dict(config, **rest)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **rest: Any) -> Any:
        """Raises ValueError for a damaged one, and for a model that this transformers does not know."""
        config = unguarded(config_dict, cls.quant_method)
        model_type = config["model_type"]
        if model_type in CONFIG_MAPPING:
            original = CONFIG_MAPPING[model_type]
        elif cls.is_trusted and "AutoConfig" in config.get("auto_map", {}):
            original = get_class_from_dynamic_module(config["auto_map"]["AutoConfig"], rest["name_or_path"])
        else:
            raise ValueError(f"transformers does not know the compressed model's type '{model_type}'")
        return original.from_dict(config, **rest)


# Where lowrank_lab is imported; elsewhere the config.json names this class.
AutoConfig.register(MODEL_TYPE, CompressedConfig, exist_ok=True)
