"""Checkpoints of compressed models, which transformers loads like those of any other quantization method.

config.json lists the sites under ``quantization_config`` (saved.py). Before the weights are read, each member of
a site is replaced by empty factors, and ``from_pretrained`` fills them by their names. Importing this module
registers the method; ``import lowrank_lab`` sees to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_lab.checkpoints.description import QUANT_METHOD, Saved
from lowrank_lab.errors import UserError
from lowrank_lab.lowrank.ranks import Ranks, Site, Sites
from lowrank_lab.models.discovery import family_of
from lowrank_lab.models.families import Tower, folding_of
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules import steps
from lowrank_lab.modules.attention import cache_of, round_cache
from lowrank_lab.modules.factorized import FactorizedLinear, dense_weight, factorize, factors_of
from lowrank_lab.modules.linears import Followed, output_side, prepared_in, set_steps
from lowrank_lab.modules.mixed import MixedLinear, install_empty
from lowrank_lab.modules.quantized import QuantizedLinear

# What the factors of each kind are made of.
HALVES = {nn.Linear: "factors", QuantizedLinear: "factors", MixedLinear: "remap"}


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json. Raises UserError for one that this version cannot read."""

    quant_method = QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.saved = Saved.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        return self.saved.to_dict()


@register_quantizer(QUANT_METHOD)
class LowRankQuantizer(HfQuantizer):
    """Puts empty factors into a model before ``from_pretrained`` reads its weights.

    Tensors take the dtype that is asked for, as in any model, but those of MixedLinear keep their own.
    """

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        saved = self.quantization_config.saved
        for block, name in _blocks(model, saved.sites):
            site, rank = saved.sites[name], saved.ranks[name]
            if rank is not None and saved.kind == "remap":
                install_empty(block, site, rank)
            elif rank is not None:
                empty = torch.empty(site.out, rank, device="meta"), torch.empty(rank, site.inp, device="meta")
                factorize(block, site, *empty)
            if rank is not None:
                # GPT-2 sets initial weights of a block's linears from above, where it would miss theirs.
                for member in site.members:
                    parent: Any = block.get_submodule(member.rpartition(".")[0])
                    parent._is_hf_initialized = True
        for names, described in saved.steps.items():
            places = [name.partition(".") for name in names.split(",")]
            block = _block(model, int(places[0][0]))
            set_steps(block, [path for _, _, path in places], steps.empty(described))
            for _, _, path in places:
                owner: Any = block.get_submodule(path.rpartition(".")[0])
                owner._is_hf_initialized = True
        if saved.final:
            path = _path(model, folding_of(family_of(model).tower).final_norm)
            model.set_submodule(path, Followed(model.get_submodule(path), steps.empty(saved.final)))
        for name, form in saved.quantized.items():
            index, _, path = name.partition(".")
            block = _block(model, int(index))
            linear: Any = block.get_submodule(path)
            shape = dense_weight(linear).shape
            block.set_submodule(path, QuantizedLinear.empty(form, (shape[0], shape[1]), linear.bias))
            owner = block.get_submodule(path.rpartition(".")[0])
            owner._is_hf_initialized = True
        if saved.kv_cache is not None:
            round_cache(model, saved.kv_cache)
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
            if isinstance(module, (MixedLinear, QuantizedLinear, steps.Step)):
                module.requires_grad_(False)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return merge(model, self.quantization_config.saved)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        saved = self.quantization_config.saved
        return saved.kind == "factors" and not saved.is_quantized


def describe(model: nn.Module, tower: Tower, sites: Sites, ranks: Ranks, method: str, ratio: float) -> Saved:
    """How ``model`` was compressed. Raises UserError for a storage that checkpoints cannot hold."""
    found = set()
    quantized = {
        f"{index}.{path}": module.format
        for index, block in enumerate(blocks_of(model, tower))
        for path, module in block.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    for name, site in sites.items():
        if ranks[name] is None:
            continue
        block = model.get_submodule(f"{tower.blocks}.{site.block}")
        for member in site.members:
            module: Any = block.get_submodule(member)
            left = block.get_submodule(output_side(block, member))
            found.add(HALVES.get(type(left)) if isinstance(module, FactorizedLinear) else None)
    steps_of = {
        ",".join(f"{index}.{path}" for path in paths): steps.describe(prepared)
        for index, block in enumerate(blocks_of(model, tower))
        for paths, prepared in prepared_in(block)
    }
    final = [step for norm in model.modules() if isinstance(norm, Followed) for step in steps.describe(norm.steps)]
    kind = found.pop() if len(found) == 1 else "factors" if not found else None
    if kind is None:
        raise UserError("save=true: a checkpoint cannot hold this storage; use storage=uv, u, v or remap")
    return Saved(method, ratio, kind, dict(sites), dict(ranks), quantized, steps_of, final, cache_of(model))


def save(folder: Path, model: Any, tokenizer: Any, use_cache: bool, saved: Saved | None) -> None:
    """Write ``model`` and all that belongs to it: safetensors, config.json, generation config, tokenizer.

    ``saved`` says how it was compressed (None: it is dense), ``use_cache`` what its config said before it was
    loaded here. Tied tensors are stored once.
    """
    # The older names of some architectures' tensors are for their dense models; factors keep those of the modules.
    model.save_pretrained(folder, save_original_format=saved is None)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["use_cache"] = use_cache
    if saved is not None:
        config["quantization_config"] = saved.to_dict()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merge(model: Any, saved: Saved) -> Any:
    """Put dense linears in the place of all factors of ``model``, in its dtype; the product is made in float32.

    Raises UserError for a model that does more in its forward than multiply.
    """
    if saved.online:
        raise UserError("dense weights cannot hold what this model does to inputs of linears, or keys and values")
    with torch.device("meta"):
        skeleton = type(model)(model.config)  # it knows whether a linear is a Linear or a Conv1D
    dtype = model.get_input_embeddings().weight.dtype
    dense_blocks = _blocks(skeleton, saved.sites)
    for (block, name), (dense_block, _) in zip(_blocks(model, saved.sites), dense_blocks, strict=True):
        site = saved.sites[name]
        weight = _product(block, site)
        if weight is None:
            continue
        rows = weight.to(dtype).split(site.outs)
        for member, its_rows in zip(site.members, rows, strict=True):
            linear: Any = dense_block.get_submodule(member)
            its_rows = its_rows.T if isinstance(linear, Conv1D) else its_rows
            linear.weight = nn.Parameter(its_rows.clone(memory_format=torch.contiguous_format))
            module: Any = block.get_submodule(member)
            bias = getattr(module.left if isinstance(module, FactorizedLinear) else module, "bias", None)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach())
            block.set_submodule(member, linear)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _product(block: nn.Module, site: Site) -> Tensor | None:
    """The weight (out, in), float32, that a site multiplies with; None where it is dense as it was."""
    factors = factors_of(block, site)
    if factors is not None:
        left, right = factors
        return left.float() @ right.float()
    members: list[Any] = [block.get_submodule(name) for name in site.members]
    if all(isinstance(member, QuantizedLinear) for member in members):
        return torch.cat([member.weight for member in members])
    return None


def _blocks(model: Any, sites: Sites) -> list[tuple[nn.Module, str]]:
    """The block of each site, with the site's name."""
    return [(_block(model, site.block), name) for name, site in sites.items()]


def _block(model: Any, index: int) -> nn.Module:
    """One block of ``model``, which may also be a bare one, without lm_head."""
    blocks: Any = model.get_submodule(_path(model, family_of(model).tower.blocks))
    return blocks[index]


def _path(model: Any, path: str) -> str:
    """Where a module of a model with lm_head is in ``model``, which may also be a bare one."""
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else path
