"""The dtype of a model's weights on disk, where it is not that in memory.

Some tensors have a fixed dtype: codes, the scales of formats, what a model keeps in float32. ``from_pretrained``
knows them by the empty model that it fills, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints.description import Saved
from lowrank_lab.models.default_dtype import default_dtype
from lowrank_lab.models.load import DTYPES
from lowrank_lab.modules.rebuild import build_modules

MARK = torch.float64  # no tensor has it by itself, so those that have it here follow the dtype of the model


@contextmanager
def in_dtype(model: Any, saved: Saved | None, dtype: str | None) -> Iterator[None]:
    """Within it, ``model`` has its weights in ``dtype`` (None: as they are); afterwards the same ones as before.

    Raises UserError where a weight is too large for it.
    """
    casted = {} if dtype is None else _casted(model, saved, dtype)
    if dtype is None or not casted:
        yield
        return
    changed = {name: parameter.detach().to(DTYPES[dtype]) for name, parameter in casted.items()}
    before = {name: model.get_parameter(name).data for name in changed}
    in_config = model.config.dtype
    for name, tensor in changed.items():
        if not tensor.isfinite().all() and before[name].isfinite().all():
            raise UserError(f"save.dtype={dtype}: {name} has values too large for it; use float32 or bfloat16")
    try:
        for name, tensor in changed.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor
        model.config.dtype = in_config


def bytes_in(model: Any, saved: Saved | None) -> dict[str, int]:
    """The bytes of the parameters of ``model`` in each dtype that it can be saved in."""
    empty = _empty(model, saved)
    return {dtype: _bytes(model, _casted(model, saved, dtype, empty), kind) for dtype, kind in DTYPES.items()}


def _bytes(model: Any, casted: Mapping[str, nn.Parameter], dtype: torch.dtype) -> int:
    size = lambda name, one: dtype.itemsize if name in casted else one.element_size()
    return sum(one.numel() * size(name, one) for name, one in model.named_parameters())


def _casted(model: Any, saved: Saved | None, dtype: str, empty: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters that get ``dtype`` where the model is saved in it, by name."""
    if DTYPES[dtype] == model.dtype:  # as it is
        return {}
    empty = _empty(model, saved) if empty is None else empty
    follow = {name for name, parameter in empty.named_parameters() if parameter.dtype == MARK}
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != "float32" else set()
    if dtype == "float16":
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    is_kept = lambda name: any(fnmatchcase(name, f"*{part}*") for part in kept)
    named = model.named_parameters()
    return {name: one for name, one in named if name in follow and one.is_floating_point() and not is_kept(name)}


def _empty(model: Any, saved: Saved | None) -> nn.Module:
    """The model without values, as ``from_pretrained`` builds it, were its dtype MARK."""
    with torch.device("meta"), default_dtype(MARK):
        empty = type(model)(deepcopy(model.config))
        if saved is not None:
            build_modules(empty, saved.modules)
    return empty
