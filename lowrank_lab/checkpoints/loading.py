"""How transformers loads a compressed model.

config.json describes every module that replaces one of the dense model's modules, under ``quantization_config``.
Before ``from_pretrained`` reads the weights, this adds these modules to the dense model without values, and
``from_pretrained`` fills them by their names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints.auto_config import CompressedConfig
from lowrank_lab.checkpoints.description import QUANT_METHOD, Saved
from lowrank_lab.models.own_config import CARD, CODE, guarded
from lowrank_lab.modules.base import Described, Replacement, bias_of, dense_weight
from lowrank_lab.modules.factorized import factors_of
from lowrank_lab.modules.rebuild import build_modules, set_up_modules


class LowRankConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json. Raises UserError for one that cannot be read."""

    quant_method = QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.saved = Saved.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        return {**self.saved.to_dict(), "quant_method": self.quant_method}


class LowRankQuantizer(HfQuantizer):
    """Puts empty modules into a model before ``from_pretrained`` reads its weights.

    Tensors get the requested dtype, as in any model, except those whose format has a fixed dtype.
    """

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        saved = self.quantization_config.saved
        build_modules(model, _paths_in(model, saved.modules))
        set_up_modules(model, saved.modules)
        self._shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # transformers leaves the shapes of quantized tensors to the quantizer.
        for name, tensor in model.named_parameters():
            if tensor.shape != self._shapes.get(name, tensor.shape):
                raise UserError(
                    f"the checkpoint is damaged: {name} is {tuple(tensor.shape)}, not {tuple(self._shapes[name])}"
                )
        for module in model.modules():
            if isinstance(module, Described) and not getattr(module, "trainable", False):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        # transformers' own would write a config.json from which it draws weights at random.
        model.save_pretrained = partial(save_pretrained, model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return merge(model, self.quantization_config.saved)

    def code(self, model: Any) -> str | None:
        """The Python file with which transformers loads ``model``: this file, beside a saved model."""
        return Path(__file__).read_text(encoding="utf-8")

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        kinds = {description["kind"] for description in self.quantization_config.saved.modules.values()}
        return not self.quantization_config.saved.is_quantized and all(
            Replacement.of_kind(kind).trainable for kind in kinds
        )


def register(
    name: str,
    config: type[LowRankConfig] = LowRankConfig,
    quantizer: type[LowRankQuantizer] = LowRankQuantizer,
) -> None:
    """Let transformers know ``config`` and ``quantizer`` by this name."""
    CompressedConfig.quant_method = config.quant_method = name
    AUTO_QUANTIZATION_CONFIG_MAPPING[name] = config
    AUTO_QUANTIZER_MAPPING[name] = quantizer


def save_pretrained(model: Any, save_directory: Any, **rest: Any) -> None:
    """``save_pretrained`` of a compressed model that was loaded; its model card goes along."""
    type(model).save_pretrained(model, save_directory, **rest)
    finish(Path(save_directory), model.hf_quantizer.code(model))
    card = Path(model.name_or_path, CARD)
    if card.is_file():
        (Path(save_directory) / CARD).write_text(card.read_text(encoding="utf-8"), encoding="utf-8")


def finish(folder: Path, code: str | None) -> None:
    """Guard the config.json in ``folder``, whose ``quantization_config`` is ours, and add the ``code``."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config = guarded(config, config["model_type"] in CONFIG_MAPPING, code is not None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if code is not None:
        (folder / f"{CODE}.py").write_text(code, encoding="utf-8")


def merge(model: Any, saved: Saved) -> Any:
    """Replace all factors of ``model`` by dense linears, in its dtype; their products are computed in float32.

    Raises UserError for a model whose forward does more than multiply by weights.
    """
    if saved.online:
        raise UserError("dense weights cannot hold the changes of inputs, keys or values in this model")
    with torch.device("meta"):
        skeleton = type(model)(model.config)  # it knows whether a linear is a Linear or a Conv1D
    dtype = model.dtype
    for path, weight in _dense_weights(model, saved):
        linear: Any = skeleton.get_submodule(path)
        weight = weight.to(dtype)
        weight = weight.T if isinstance(linear, Conv1D) else weight
        linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        if (bias := bias_of(model.get_submodule(path))) is not None:
            linear.bias = nn.Parameter(bias.detach())
        model.set_submodule(path, linear)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        vars(model).pop("save_pretrained", None)
    return model


def _dense_weights(model: Any, saved: Saved) -> Iterator[tuple[str, Tensor]]:
    """By path the weight (out, in), float32, of every compressed linear; factors are multiplied once a site."""
    outermost = [_path(model, path) for path in saved.modules if not _within(path, saved.modules)]
    for name, site in saved.sites.items():
        prefix = _path(model, name).removesuffix(site.key)
        factors = factors_of(model.get_submodule(prefix.removesuffix(".")), site)
        if factors is not None:
            left, right = factors
            rows = (left.float() @ right.float()).split(site.outs)
            for member, weight in zip(site.members, rows, strict=True):
                outermost.remove(f"{prefix}{member}")
                yield f"{prefix}{member}", weight
    for path in outermost:
        yield path, dense_weight(model.get_submodule(path))


def _within(path: str, modules: Collection[str]) -> bool:
    """Whether the module at ``path`` is a part of another one of ``modules``."""
    names = path.split(".")
    return any(".".join(names[:count]) in modules for count in range(1, len(names)))


def _paths_in(model: Any, modules: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``modules`` by their paths in ``model``, which may also be a model without lm_head."""
    in_model = {_path(model, path): dict(description) for path, description in modules.items()}
    for description in in_model.values():
        if "borrows" in description:
            description["borrows"] = {name: _path(model, shared) for name, shared in description["borrows"].items()}
    return in_model


def _path(model: Any, path: str) -> str:
    """The path in ``model``, which may be without lm_head, of a module of the model with lm_head."""
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else path
