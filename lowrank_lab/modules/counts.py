"""The parameters, bytes and multiply-accumulates of a model or a part of it: the sums over its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lowrank_lab.models.vision_families import PLACES
from lowrank_lab.modules.base import CompressedLinear, Counts, dense_weight, is_linear, nbytes
from lowrank_lab.modules.steps import Step


def count(module: nn.Module) -> Counts:
    """The counts of all linear layers in ``module``, lm_head too, and of the steps before them."""
    if isinstance(module, (CompressedLinear, Step)):
        return module.counts()
    if is_linear(module):
        return Counts.of_weights(dense_weight(module))
    return sum((count(child) for child in module.children()), Counts())


def parameters(model: nn.Module) -> int:
    """The parameters of the whole model, tied ones once; scales of few bits count as bytes alone."""
    counted = list(_counted(model))
    inside = {
        id(parameter)
        for module in counted
        for name, parameter in module.named_parameters()
        if name.rpartition(".")[2] != "bias"
    }
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return others + sum(module.counts().parameters for module in counted)


def bytes_of_parts(model: nn.Module, linears: list[nn.Module]) -> int:
    """The bytes of ``linears`` of ``model``, and of the steps before any linear."""
    inside = {id(module) for linear in linears for module in linear.modules()}
    steps = [module for module in model.modules() if isinstance(module, Step) and id(module) not in inside]
    return sum(count(linear).bytes for linear in linears) + sum(nbytes(*step.parameters()) for step in steps)


def _counted(module: nn.Module) -> Iterator[CompressedLinear | Step]:
    """The outermost modules in ``module`` that count themselves."""
    if isinstance(module, (CompressedLinear, Step)):
        yield module
        return
    for child in module.children():
        yield from _counted(child)


def macs_of_token(model: Any) -> int:
    """The multiply-accumulates of all linears for a token; of images and text those of the language model alone."""
    if (places := PLACES.get(model.config.model_type)) is None:
        return count(model).macs
    return count(model.get_submodule(places[0])).macs + count(model.get_output_embeddings()).macs
