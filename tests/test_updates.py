"""Refinements in closed form: the sequential update and incremental PCA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.statistics import make_statistics
from lowrank_lab.lowrank import factors
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.factors import load_factors
from lowrank_lab.lowrank.metric.second_moment import SecondMoment
from lowrank_lab.lowrank.ranks import rank_for_ratio
from lowrank_lab.lowrank.refinement.ipca import Ipca, Update, complete, leading_directions, merge
from lowrank_lab.lowrank.refinement.sequential_update import SequentialUpdate, refit_left
from lowrank_lab.lowrank.solver import decompose
from lowrank_lab.lowrank.spectra import load_spectrum, make_spectra
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.walk import block_file, blocks_of, walk
from lowrank_lab.modules.factorized import dense_weight, factorize, site_weight
from lowrank_lab.modules.site import by_block
from tests.sites import sites_in

from .conftest import stopped_at_block_one

CPU = torch.device("cpu")
SOME = ["llama", "opt", "gpt2"]  # separate linears, biases and flattened sequences, transposed weights


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[(family, ()) for family in SOME] + [("llama", ("qkv", "gate_up"))], ids=str)
def context(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path: Path) -> Any:
    return make_bench(checkpoints, tmp_path, *request.param)


def make_bench(
    checkpoints: dict[str, Path], folder: Path, family: str = "llama", joint: tuple[str, ...] = ()
) -> Any:
    """What a refinement reads of a Context: a tiny model with biases that are not zero, and its spectra."""
    tower = FAMILIES[family].tower

    def dense() -> Any:
        model = load_model(str(checkpoints[family]), None, "float32", False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(0.05)
                elif parameter.ndim == 2:  # far enough from linear for a compressed prefix to show
                    parameter.mul_(3)
        return model

    ids = torch.randint(4, 260, (5, 24), generator=torch.Generator().manual_seed(1))
    model, statistics, spectra_of = dense(), folder / "statistics", folder / "spectra"
    statistics.mkdir()
    spectra_of.mkdir()
    sites = sites_in(model, tower, joint)
    make_statistics(statistics, model, tower, ids.split(2), CPU)
    make_spectra(spectra_of, model, tower, sites, SecondMoment(cholesky=False), statistics, None, CPU)
    cell = SimpleNamespace(cfg=SimpleNamespace(calibration=SimpleNamespace(batch_size=2)))
    facts = {"tower": tower, "device": CPU, "calibration_ids": ids, "sites": sites}
    facts |= {"calibration": {"input_ids": ids}, "calibration_positions": ids.numel()}
    once = lambda _name, _make: spectra_of
    walked = lambda model, samples=None: walk(model, tower, ids[:samples].split(2), CPU)
    return SimpleNamespace(**facts, cell=cell, cached=once, model=model, take_model=dense, dense=dense, walk=walked)


def ranks_of(context: Any, ratio: float = 0.6) -> dict[str, int | None]:
    """One site of the second block and all of the last stay dense."""
    ranks: dict[str, int | None] = {name: rank_for_ratio(site, ratio) for name, site in context.sites.items()}
    for name, site in context.sites.items():
        if site.block == 2:
            ranks[name] = None
    ranks[next(name for name, site in context.sites.items() if site.block == 1)] = None
    return ranks


def made(tmp_path: Path, name: str = "factors") -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def interrupted_after_a_block(refinement: Any, context: Any, ranks: Any, folder: Path, monkeypatch: Any) -> None:
    with stopped_at_block_one(monkeypatch, factors):
        refinement(context, ranks, folder)
    assert [file.name for file in folder.iterdir()] == [block_file(0)]


@pytest.mark.parametrize("refinement", [SequentialUpdate(), Ipca(None)], ids=["sequential_update", "ipca"])
def test_an_interrupted_refinement_goes_on_to_the_same_numbers(refinement, checkpoints, tmp_path, monkeypatch):
    context = make_bench(checkpoints, tmp_path)
    ranks = ranks_of(context)
    whole, parts = made(tmp_path, "whole"), made(tmp_path, "parts")
    refinement(context, ranks, whole)
    interrupted_after_a_block(refinement, context, ranks, parts, monkeypatch)
    first = (parts / block_file(0)).stat().st_mtime_ns
    refinement(context, ranks, parts)
    assert (parts / block_file(0)).stat().st_mtime_ns == first
    assert sorted(file.name for file in parts.iterdir()) == [block_file(i) for i in range(3)]
    for i in range(3):
        assert (parts / block_file(i)).read_bytes() == (whole / block_file(i)).read_bytes()


# The sequential update


def problem(tokens: int, out: int = 7, inp: int = 6, rank: int = 3) -> tuple[torch.Tensor, ...]:
    w, x = random(out, inp), random(tokens, inp, seed=1)
    left, right, _ = decompose(w, None, None).factors(w, rank)
    return w, x, left, right


def test_refit_is_least_squares():
    w, x, left, right = problem(50)
    expected = torch.linalg.lstsq(x @ right.T, x @ w.T).solution.T
    torch.testing.assert_close(refit_left(w, left, right, x.T @ x), expected)
    torch.testing.assert_close(refit_left(w, left + 5, right, x.T @ x), expected)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_refit_on_too_few_tokens_changes_no_more_than_it_must(tokens):
    """The change explains the tokens exactly and is zero for latents orthogonal to all that they showed."""
    w, x, left, right = problem(max(tokens, 1))
    x = x[:tokens]
    refit = refit_left(w, left, right, x.T @ x)
    torch.testing.assert_close(x @ (refit @ right).T, x @ w.T)
    assert torch.linalg.matrix_rank(refit - left) == tokens


def test_refit_survives_dead_channels_and_any_scale():
    w, x, left, right = problem(50)
    right[2] = 0  # the weight had a lower rank
    left, right = left * 1e-6, right * torch.tensor([1e6, 1e-2, 1.0], dtype=torch.float64).unsqueeze(-1)
    x[:, 0] *= 1e4
    x[:, 3] = 0
    refit = refit_left(w, left, right, x.T @ x)
    best = torch.linalg.lstsq(x @ right[:2].T, x @ w.T).solution
    assert torch.isfinite(refit).all()
    assert (x @ (w - refit @ right).T).norm() == pytest.approx(float((x @ (w.T - right[:2].T @ best)).norm()))


def test_the_refit_is_never_worse_on_what_the_compressed_prefix_feeds_it(context, tmp_path):
    """Measured in float64 on the very inputs, against the closed form's factors and the best possible left."""
    ranks, folder = ranks_of(context), made(tmp_path)
    SequentialUpdate()(context, ranks, folder)
    model = context.dense()
    gain = []
    for index, block, run in walk(model, context.tower, context.calibration_ids.split(2), CPU):
        here = {name: site for name, site in by_block(context.sites, 3)[index].items() if ranks[name] is not None}
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in here}
        hooks = []
        for name, site in here.items():
            hook = lambda _m, args, into=seen[name]: into.append(args[0].flatten(0, -2).double())
            hooks.append(block.get_submodule(site.members[0]).register_forward_pre_hook(hook))
        run(advance=False)
        for hook in hooks:
            hook.remove()
        for name, site in here.items():
            x, weight = torch.cat(seen[name]), site_weight(block, site).double()
            plain = load_spectrum(spectra(context), site, CPU).factors(weight, ranks[name])
            left, right = (factor.double() for factor in load_factors(folder, site))
            torch.testing.assert_close(right, plain[1], rtol=1e-5, atol=1e-6)  # kept
            errors = [float((x @ (weight - product).T).norm()) for product in (plain[0] @ plain[1], left @ right)]
            assert errors[1] <= errors[0] * (1 + 1e-6)
            best = torch.linalg.lstsq(x @ right.T, x @ weight.T).solution
            assert errors[1] == pytest.approx(float((x @ weight.T - x @ right.T @ best).norm()), rel=1e-4)
            gain.append(errors[1] / errors[0])
            factorize(block, site, left, right)
        run()
    assert min(gain) < 0.99
    first = [
        g for g, name in zip(gain, (n for n in context.sites if ranks[n] is not None), strict=True) if ".0." in name
    ]
    assert min(first) > 1 - 1e-6  # nothing is compressed before the first block: the closed form is best there


@pytest.mark.parametrize("family", SOME)
def test_sequential_update_end_to_end(lab, family):
    record = lab.run(f"model.path=tiny:{family}", "method=svdllm_u", "ratio=0.6")
    assert record["status"] == "done", record
    assert record["metrics"]["ppl"]["value"] < 600
    assert record["sizes"]["ratio_reached"] <= 0.6
    assert "refinement" in [stage["stage"] for stage in record["stages"]]


# Incremental PCA


def after(samples: list[torch.Tensor], weight: torch.Tensor, rank: int) -> torch.Tensor:
    """W̃ from the samples' inputs."""
    update = Update("linear", weight, rank)
    for x in samples:
        update.add(x)
    left, right = update.factors()
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
    return left @ right


SHAPES = [(8, 12), (12, 8), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [30, 7])
def test_one_sample_gives_the_pooled_solution(shape, tokens):
    w, x = random(*shape), random(tokens, shape[1], seed=1)
    left, right, _ = decompose(w, x.T @ x, None).factors(w, 5)
    torch.testing.assert_close(after([x], w, 5), left @ right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [30, 5])
def test_a_common_subspace_is_found_exactly(shape, tokens):
    w, basis = random(*shape), random(4, shape[1], seed=1)
    samples = [random(tokens, 4, seed=2 + i) @ basis for i in range(6)]
    found = after(samples, w, 4)
    for x in samples:
        torch.testing.assert_close(x @ found.T, x @ w.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pooled_solution_is_never_worse(shape):
    w = random(*shape)
    samples = [random(20, shape[1], seed=i) * torch.logspace(0, -2, shape[1]) for i in range(8)]
    c = sum(x.T @ x for x in samples)
    for rank in (1, 3, 6):
        error = w - after(samples, w, rank)
        assert float((error @ c * error).sum()) >= decompose(w, c, None).squared_error(rank)


@pytest.mark.parametrize("shape", [(10, 3, 3), (10, 4, 2), (4, 3, 3), (5, 5, 5), (12, 1, 1)])
def test_a_step_is_the_decomposition_of_algorithm_2(shape):
    """[V_old, (1 − 1/i) V_i] decomposed in full; the signs of singular vectors make no difference."""
    p, k, of_sample = shape
    old, new = torch.linalg.qr(random(p, k))[0], torch.linalg.qr(random(p, of_sample, seed=1))[0]
    u = torch.linalg.svd(torch.cat([old, new * (1 - 1 / 3)], 1))[0][:, :k]
    signs = torch.tensor([-1.0] + [1.0] * (of_sample - 1), dtype=torch.float64)
    for merged in (merge(old, new, 3, k), merge(-old, new * signs, 3, k)):
        torch.testing.assert_close(merged @ merged.T, u @ u.T)


def test_a_step_between_orthogonal_and_between_equal_subspaces():
    q = torch.linalg.qr(random(9, 6))[0]
    old, new = q[:, :3], torch.stack([q[:, 1], q[:, 4], q[:, 5]], 1)
    for number in (2, 256):  # what is new all over comes second to what is old
        merged = merge(old, new, number, 3)
        torch.testing.assert_close(merged @ merged.T, old @ old.T)


def test_leading_directions_of_columns_that_are_nearly_the_same():
    base = torch.linalg.qr(random(12, 4))[0]
    columns = torch.cat([base, base + 1e-9 * random(12, 4, seed=1)], 1)
    found = leading_directions(columns, 6)
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))
    torch.testing.assert_close(found[:, :4] @ found[:, :4].T, base @ base.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_that_the_samples_do_not_have_go_to_the_weight(shape):
    w, x = random(*shape), [random(1, shape[1], seed=1 + i) for i in range(2)]
    found = after(x, w, 6)
    for one in x:
        torch.testing.assert_close(one @ found.T, one @ w.T)
    v = torch.linalg.qr(torch.stack([(w @ one.T).flatten() for one in x], 1))[0]
    best = torch.linalg.svdvals(w - v @ (v.T @ w))[4:].norm()
    assert (w - found).norm() == pytest.approx(float(best))


def test_completion_of_a_weight_without_enough_directions():
    """The rank asked for is given, orthonormal, whatever W has."""
    w = random(8, 2) @ random(2, 9, seed=1)
    v = complete(torch.linalg.qr(w @ random(9, 1, seed=2))[0], w, 5)
    torch.testing.assert_close(v.T @ v, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(v @ (v.T @ w), w)
    torch.testing.assert_close(after([torch.zeros(3, 9)], w, 5), w)


def test_activations_that_are_not_finite_raise_with_a_name():
    with pytest.raises(FloatingPointError, match="linear"):
        after([torch.full((3, 4), torch.inf)], random(5, 4), 2)


def literal(activations: list[torch.Tensor], rank: int) -> torch.Tensor:
    """Algorithm 2 with full decompositions; returns the projection V Vᵀ."""
    v = torch.empty(0)
    for i, a in enumerate(activations, 1):
        v_i = torch.linalg.svd(a, full_matrices=False)[2][:rank].T
        v = v_i if i == 1 else torch.linalg.svd(torch.cat([v, v_i - v_i / i], 1))[0][:, :rank]
    return v @ v.T


def test_ipca_sees_the_outputs_of_the_dense_model(context, tmp_path):
    """Algorithm 2 on what each linear gives in the model's own forward, one sequence at a time, less its bias."""
    ranks, folder, samples = ranks_of(context, 0.5), made(tmp_path), 3
    Ipca(samples)(context, ranks, folder)
    linears = [f"{context.tower.blocks}.{i}.{name}" for i in range(3) for name in context.tower.linears]
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name in linears:
        hook = lambda _m, _a, out, into=outputs[name]: into.append(out.flatten(0, -2))
        context.model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for sequence in context.calibration_ids[:samples]:
            context.model(sequence[None], use_cache=False)
    blocks = blocks_of(context.model, context.tower)
    for name, site in context.sites.items():
        if ranks[name] is None:
            continue
        members = [f"{context.tower.blocks}.{site.block}.{member}" for member in site.members]
        biases = [getattr(context.model.get_submodule(member), "bias", None) for member in members]
        seen = [
            torch.cat([outputs[m][n] - (0 if b is None else b) for m, b in zip(members, biases, strict=True)], 1)
            for n in range(samples)
        ]
        weight = (
            torch.cat([dense_weight(context.model.get_submodule(member)) for member in members]).detach().double()
        )
        torch.testing.assert_close(weight, site_weight(blocks[site.block], site).double())
        left, right = (factor.double() for factor in load_factors(folder, site))
        assert left.shape == (site.out, ranks[name]) and right.shape == (ranks[name], site.inp)
        expected = literal([a.detach().double() for a in seen], ranks[name]) @ weight
        torch.testing.assert_close(left @ right, expected, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


def test_ipca_end_to_end(lab):
    record = lab.run("method=svdllm", "refinement=ipca", "refinement.samples=6", "ratio=0.6")
    assert record["status"] == "done", record
    assert record["metrics"]["ppl"]["value"] < 600
    other = lab.run("method=svdllm", "refinement=ipca", "refinement.samples=5", "ratio=0.6")
    assert other["metrics"]["ppl"]["value"] != record["metrics"]["ppl"]["value"]


def test_settings_of_ipca_are_checked(lab):
    with pytest.raises(UserError, match="samples=0 is not valid"):
        lab.cells("refinement=ipca", "refinement.samples=0")
    with pytest.raises(UserError, match=r"refinement\.samples=13 is not valid; it must be at most calibration"):
        lab.cells("refinement=ipca", "refinement.samples=13", "calibration.samples=12")
