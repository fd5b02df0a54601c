"""Statistics, gradients, Fisher and spectra are of the dense model, whatever has become of the cell's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.spectra import compress
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.changes import Snapshot
from lowrank_lab.models.walk import on_device
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context

from .conftest import Lab

CPU = torch.device("cpu")
ARTIFACTS: dict[str, Callable[[Context], Path]] = {
    "statistics": lambda context: context.statistics,
    "gradients": lambda context: context.gradients(outer=True),
    "weight_fisher": lambda context: context.weight_fisher,
    "spectra": spectra,
}


def context_of(lab: Lab) -> Context:
    """A context whose metric asks for everything."""
    [cell] = lab.cells("method=kron", "ratio=0.6", "model.path=tiny:llama")
    return Context(cell, Record(cell, None, None), CPU)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("dense") / "results", data_root)


def made(context: Context, artifact: str) -> dict[str, torch.Tensor]:
    files = sorted(ARTIFACTS[artifact](context).glob("*.safetensors"))
    found = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    assert found
    return found


def replace_a_linear(context: Context) -> None:
    block: Any = context.model.get_submodule(f"{context.tower.blocks}.1")
    block.set_submodule("mlp.up_proj", nn.Linear(48, 80, bias=False))


@torch.no_grad()
def zero_weights(context: Context) -> None:
    for name, parameter in context.model.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.zero_()


def write_into_data(context: Context) -> None:
    for name, parameter in context.model.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.data.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5)


def assign_data(context: Context) -> None:
    for name, parameter in context.model.named_parameters():
        if name.endswith("q_proj.weight"):
            parameter.data = parameter.data * 2


def write_one_value_after_a_compression(context: Context) -> None:
    context.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[1, 2] += 9  # no part of a snapshot
    context.model_was_changed()  # as the pipeline does


def replace_the_model(context: Context) -> None:
    model = context.take_model()
    nn.init.zeros_(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    context.model = model


CHANGES: list[Callable[[Context], None]] = [
    replace_a_linear,
    zero_weights,
    write_into_data,
    assign_data,
    write_one_value_after_a_compression,
    replace_the_model,
]


@pytest.fixture(scope="module")
def expected(lab: Lab) -> dict[str, dict[str, torch.Tensor]]:
    context = context_of(lab)
    return {artifact: made(context, artifact) for artifact in ARTIFACTS}


# Every change with half of the artifacts, every artifact with half of the changes.
PAIRS = [
    (change, artifact)
    for first, change in enumerate(CHANGES)
    for second, artifact in enumerate(ARTIFACTS)
    if (first + second) % 2 == 0
]


@pytest.mark.parametrize(("change", "artifact"), PAIRS)
def test_a_changed_model_is_in_no_artifact(lab, tmp_path, data_root, expected, artifact, change):
    mine = Lab(tmp_path / "results", data_root)
    context = context_of(mine)
    change(context)
    changed = {name: parameter.clone() for name, parameter in context.model.named_parameters()}
    found = made(context, artifact)
    assert found.keys() == expected[artifact].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[artifact][name]), name
    for name, parameter in context.model.named_parameters():  # and the cell's model is as it was left
        assert torch.equal(parameter, changed[name])


def test_a_compressed_model_is_in_no_artifact(tmp_path, data_root, expected):
    mine = Lab(tmp_path / "results", data_root)
    context = context_of(mine)
    ranks = dict.fromkeys(context.sites, 4)
    compress(context.model, context.tower, context.sites, ranks, spectra(context), Absorb(0.5), CPU)
    for name, tensor in made(context, "weight_fisher").items():
        assert torch.equal(tensor, expected["weight_fisher"][name])


def test_an_unchanged_model_is_loaded_once(tmp_path, data_root, monkeypatch):
    context = context_of(Lab(tmp_path / "results", data_root))
    loads: list[str] = []
    load = context.task.load
    monkeypatch.setattr(type(context.task), "load", lambda _self, *a, **k: (loads.append("load"), load(*a, **k))[1])
    for artifact in ARTIFACTS:
        made(context, artifact)
    assert loads == ["load"]


def test_moving_a_block_and_back_is_no_change(checkpoints):
    from lowrank_lab.models.load import load_model

    model: Any = load_model(str(checkpoints["llama"]), None, "bfloat16", False)
    watched = Snapshot(model)
    with on_device(model.model.layers[0], CPU):
        model(torch.arange(4, 20)[None])
    assert not watched.changed(model)
    model.model.layers[0].forward = lambda *_args, **_kwargs: None
    assert watched.changed(model)
