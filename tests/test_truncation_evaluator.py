"""Truncated activations against truncated weights: the optimum (Eckart-Young), the definition, the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.evaluation.chosen_sites import chosen_sites
from lowrank_lab.evaluation.robust import NotFiniteError
from lowrank_lab.evaluation.truncation import Truncation, compare
from lowrank_lab.lowrank.masked import TruncatedActivation, first
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.modules.factorized import dense_weight
from lowrank_lab.reporting import figures, tables
from lowrank_lab.reporting.sections import TRUNCATION

from .conftest import load_lively

CPU = torch.device("cpu")
SOME = ["llama", "gpt2", "opt", "gemma2"]


@pytest.fixture(scope="module", params=SOME)
def family(request: Any) -> str:
    return request.param


def load(checkpoints: dict[str, Path], family: str) -> Any:
    """A tiny model whose loss depends on its weights, with biases that are not zero."""
    return load_lively(checkpoints[family], weights=4, bias=0.5)


def some_windows(count: int = 2, length: int = 90) -> torch.Tensor:
    return torch.randint(4, 260, (count, length), generator=torch.Generator().manual_seed(1))


def nll(model: nn.Module, windows: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).to(matrix)


@pytest.mark.parametrize("shape", [(40, 12, 20), (40, 20, 12), (9, 20, 12)], ids=str)
def test_truncated_activations_are_the_best_of_their_rank(shape):
    """Eckart-Young: the squared error is the tail of σ(A)², and never above that of any W' of this rank."""
    tokens, out, inp = shape
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(inp, out, bias=False)
    x = torch.randn(1, tokens, inp, generator=generator)
    with torch.no_grad():
        exact = linear(x)
        sigma = torch.linalg.svdvals(exact[0].double())
        for rank in range(1, len(sigma) + 1):
            error = (TruncatedActivation(linear, first(rank))(x) - exact).double().square().sum().item()
            tail = sigma[rank:].square().sum().item()
            assert error == pytest.approx(tail, rel=1e-4, abs=1e-9)
            of_weight = (x @ best_of_rank(linear.weight, rank).T - exact).double().square().sum().item()
            assert error <= of_weight * (1 + 1e-6) + 1e-9


def test_losses_are_those_of_the_definition(checkpoints, family):
    """The whole dense model with one linear changed by hand: its weight, or its output of each window."""
    model, tower, windows = load(checkpoints, family), FAMILIES[family].tower, some_windows()
    sites = chosen_sites(model, tower, None, [1], "eval.truncation")
    found = compare(model, tower, sites, windows, [0.2, 0.6], CPU)
    assert found["dense_nll"] == pytest.approx(nll(model, windows), abs=1e-5)
    assert len(found["points"]) == 2 * len(tower.linears)
    # Neither could be taken for the other.
    assert max(abs(point["activation_nll"] - point["weight_nll"]) for point in found["points"]) > 2e-3
    for point in found["points"]:
        path = f"{tower.blocks}.1.{point['linear']}"
        changed = load(checkpoints, family)
        weight = dense_weight(changed.get_submodule(path))
        assert point["rank"] == round(point["ratio"] * min(weight.shape))
        weight.data.copy_(best_of_rank(weight.data, point["rank"]))
        assert point["weight_nll"] == pytest.approx(nll(changed, windows), abs=2e-5)

        changed = load(checkpoints, family)
        linear = changed.get_submodule(path)
        bias = torch.zeros(()) if linear.bias is None else linear.bias

        def truncate(_linear: Any, _inputs: Any, output: torch.Tensor, rank: int = point["rank"], bias: Any = bias):
            rows = (output - bias).flatten(0, -2)
            return best_of_rank(rows, rank).view_as(output) + bias

        linear.register_forward_hook(truncate)
        apart = sum(nll(changed, window) for window in windows.split(1)) / len(windows)
        assert point["activation_nll"] == pytest.approx(apart, abs=2e-5)


def test_full_rank_changes_nothing_and_the_model_is_left_as_it_was(checkpoints, family):
    model, tower, windows = load(checkpoints, family), FAMILIES[family].tower, some_windows()
    modules = dict(model.named_modules())
    found = compare(model, tower, chosen_sites(model, tower, None, None, "eval.truncation"), windows, [1], CPU)
    for point in found["points"]:
        assert point["weight_nll"] == pytest.approx(found["dense_nll"], abs=2e-5)
        assert point["activation_nll"] == pytest.approx(found["dense_nll"], abs=2e-5)
    assert dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in modules.values())


def test_ranks_that_truncate_no_activation_are_left_out(checkpoints):
    """16 tokens: activations of rank 16 at most. min(out, in) is 48, and 24 for k and v."""
    model, tower = load(checkpoints, "llama"), FAMILIES["llama"].tower
    sites = chosen_sites(model, tower, ["kv", "mlp.up_proj"], [0], "eval.truncation")
    points = compare(model, tower, sites, some_windows(1, 16), [0.25, 0.5, 1], CPU)["points"]
    kept = {(p["linear"], p["rank"]) for p in points}
    assert kept == {
        ("self_attn.k_proj", 6), ("self_attn.k_proj", 12), ("self_attn.v_proj", 6), ("self_attn.v_proj", 12),
        ("mlp.up_proj", 12),
    }  # fmt: skip
    with pytest.raises(SkippedCell, match="seqlen=16 is below all ranks"):
        compare(model, tower, sites, some_windows(1, 16), [1], CPU)


def test_linears_and_blocks_are_chosen_by_role_path_and_index(checkpoints):
    model, tower = load(checkpoints, "gemma2"), FAMILIES["gemma2"].tower
    of = lambda *chosen: list(chosen_sites(model, tower, *chosen, "eval.truncation"))
    assert of(["mlp.down_proj"], None) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2, 3)]
    assert of(["kv", "self_attn.k_proj"], [3]) == [f"model.layers.3.self_attn.{x}_proj" for x in "kv"]
    assert len(of(None, [0, 1, 2, 3])) == 28
    with pytest.raises(UserError, match=r"linears=q: this model has self_attn\.q_proj"):
        of(["q"], None)
    with pytest.raises(UserError, match="blocks=4: this model has the blocks 0 to 3"):
        of(None, [4])


def test_a_model_that_is_not_finite_names_its_layer(checkpoints):
    model, tower = load(checkpoints, "llama"), FAMILIES["llama"].tower
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(NotFiniteError) as raised:
        compare(model, tower, chosen_sites(model, tower, None, [0], "eval.truncation"), some_windows(), [0.5], CPU)
    assert raised.value.layer == "model.layers.1.mlp.up_proj"


GOOD: dict[str, Any] = {
    "seqlen": 16, "max_windows": None, "bos": "text", "linears": None, "blocks": None, "ratios": [0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"seqlen": 1}, {"ratios": []}, {"ratios": [0]}, {"ratios": [1.5]}, {"ratios": 0.5}, {"ratios": None},
     {"blocks": [-1]}, {"blocks": 3}, {"linears": "mlp"}, {"linears": []}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_rejected(change):
    Truncation(**GOOD)
    with pytest.raises(ValueError, match=next(iter(change))):
        Truncation(**{**GOOD, **change})


def test_the_dense_cell_of_a_grid_measures_it_and_the_report_shows_it(lab):
    settings = ("eval.truncation.seqlen=64", "eval.truncation.ratios=[0.2,0.6]", "eval.truncation.linears=[kv]")
    asked = ("eval=[ppl,truncation]", *settings)
    dense, compressed = lab.run("method=dense", *asked), lab.run("method=svd", *asked)
    assert list(compressed["metrics"]) == ["ppl"]
    measured = dense["metrics"]["truncation"]
    points = measured["points"]
    gains = [point["weight_nll"] - point["activation_nll"] for point in points]
    assert measured["value"] == pytest.approx(sum(gains) / 12) and len(points) == 2 * 3 * 2
    assert measured["protocol"]["blocks"] == [0, 1, 2]
    assert measured["protocol"]["linears"] == ["self_attn.k_proj", "self_attn.v_proj"]

    [(caption, group)] = list(tables.groups([dense, compressed], TRUNCATION))
    better = sum(gain > 0 for gain in gains)
    assert tables.presentable(group, TRUNCATION)["activations better"].tolist() == [f"{better} of 12"]
    figure = figures.truncation_against_ratio(group, caption)
    assert [axes.get_title() for axes in figure.axes] == ["k", "v"]
    assert len(figure.axes[0].get_lines()) == 2 * 3 + 1
