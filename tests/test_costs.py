"""The cost of a rank: whatever function it is, budgets are met and what is bought is the best that it buys.

Every rule is compared with the plainest reference, which tries every rank or every plan. Costs are in proportion to
the rank (two factors, remapping), concave (pivoted factors) and a staircase (ranks padded to even ones).
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.lowrank.allocation.differentiable import LearnedRank
from lowrank_lab.lowrank.allocation.global_tail import buy_segments, water_fill
from lowrank_lab.lowrank.allocation.loss_based import loss_based
from lowrank_lab.lowrank.allocation.strs import Step, candidate_ranks, finish, index_within_budget, plan
from lowrank_lab.lowrank.allocation.uniform import uniform
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import (
    Ranks,
    budget,
    cost_at,
    fit,
    rank_at,
    rank_for_ratio,
    rank_within,
    starting_share,
    total_cost,
)
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.base import Storage
from lowrank_lab.lowrank.storage.remap import Remap
from lowrank_lab.models import tiny
from lowrank_lab.modules.site import Site
from lowrank_lab.reporting.paper_figures import asvd
from tests.conftest import Lab
from tests.sites import site


class Pivoted(Absorb):
    """Factors of which one has an identity inside, so that rank k costs k (out + in − k) numbers and k places."""

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * (out + inp - rank) + rank


class AlmostPivoted(Pivoted):
    """Of the same cost at ranks 0 and 1, but not above."""

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * (out + inp - rank) + min(rank, 1)


class OfInputs(Absorb):
    """Costs as much as remapping where there are more inputs than outputs, and less elsewhere."""

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * inp


class Padded(Absorb):
    """Ranks are padded to even ones."""

    def cost(self, out: int, inp: int, rank: int) -> int:
        return -(-rank // 2) * 2 * (out + inp)


class NotNarrow(Absorb):
    """For matrices with 24 outputs no rank saves anything."""

    def cost(self, out: int, inp: int, rank: int) -> int:
        return max(super().cost(out, inp, rank), out * inp if out == 24 and rank else 0)


LINEAR = {"uv": Absorb(0.5), "remap": Remap()}
STORAGES: dict[str, Storage] = {**LINEAR, "pivoted": Pivoted(0.5), "padded": Padded(0.5)}
by_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
RATIOS = [percent / 100 for percent in (12, 25, 40, 55, 70, 80, 90, 97)]


def shapes(seed: int, count: int, low: int, high: int) -> list[tuple[int, int]]:
    generator = np.random.default_rng(seed)
    return [(int(out), int(inp)) for out, inp in generator.integers(low, high, (count, 2))]


def small_sites(storage: Storage, seed: int, count: int = 3) -> dict[str, Site]:
    """Of a few shapes, each with a rank that saves something."""
    found = [(f"n{i}", site(*shape, f"n{i}", storage)) for i, shape in enumerate(shapes(seed, 20, 3, 13))]
    return dict([(name, one) for name, one in found if one.last >= 1][:count])


def tails_of(sites: dict[str, Site], seed: int, sorted_values: bool = True) -> dict[str, np.ndarray]:
    """Errors by rank. Those of a decomposition are convex; scores of directions may rise with their number."""
    generator = np.random.default_rng(seed)
    tails = {}
    for name, one in sites.items():
        squares = generator.random(one.full) ** generator.uniform(0.3, 4)
        squares = np.sort(squares)[::-1] if sorted_values else squares
        tails[name] = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return tails


def error(tails: dict[str, np.ndarray], ranks: Ranks) -> float:
    return sum(float(tails[name][rank]) for name, rank in ranks.items() if rank is not None)


def every_plan(sites: dict[str, Site]) -> list[Ranks]:
    choices = [[(name, k) for k in (*range(1, one.last + 1), None)] for name, one in sites.items()]
    return [dict(plan) for plan in itertools.product(*choices)]


def next_rank_fits(sites: dict[str, Site], ranks: Ranks, left: int) -> bool:
    """Whether any site could still have one rank more."""
    growing = [(one, ranks[name]) for name, one in sites.items()]
    return any(k is not None and k < one.last and one.cost(k + 1) - one.cost(k) <= left for one, k in growing)


@by_storage
def test_ranks_of_a_ratio_are_those_that_trying_all_of_them_finds(storage):
    for out, inp in [*shapes(0, 60, 1, 40), (192, 576), (1536, 576)]:
        here = site(out, inp, storage=storage)
        ranks = range(1, here.full + 1)
        assert here.last == max((k for k in ranks if here.cost(k) < out * inp), default=0)
        for ratio in RATIOS:
            limit = Fraction(str(ratio)) * out * inp  # exact
            best = max((k for k in ranks if here.cost(k) <= limit), default=0)
            assert min(rank_within(here, ratio), here.full) == best
            if best == 0:
                with pytest.raises(SkippedCell):
                    rank_for_ratio(here, ratio)
            else:
                assert rank_for_ratio(here, ratio) == (best if best <= here.last else None)


@by_storage
def test_real_ranks_and_their_costs_are_on_the_lines_between_whole_ranks(storage):
    for out, inp in shapes(1, 40, 2, 40):
        here = site(out, inp, storage=storage)
        ranks = np.arange(here.full + 1)
        costs = np.array([here.cost(int(k)) for k in ranks])
        for k in np.random.default_rng(out).uniform(0, here.full, 20):
            assert cost_at(here, k) == pytest.approx(np.interp(k, ranks, costs), rel=1e-12)
        for cost in np.random.default_rng(inp).uniform(costs[1], costs[-1], 20):
            assert here.cost(int(rank_at(here, cost))) <= cost
            assert cost_at(here, rank_at(here, cost)) == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize("storage", LINEAR.values(), ids=LINEAR)
def test_a_cost_in_proportion_to_the_rank_gives_the_bits_of_a_division(storage):
    """Keys of trained ranks do not change, so their numbers may not either."""
    for out, inp in [*shapes(2, 60, 1, 40), (11008, 4096)]:
        here, generator = site(out, inp, storage=storage), np.random.default_rng(out)
        per_rank = here.cost(1)
        for number in generator.uniform(-0.2, 1.2, 20).tolist():
            assert rank_at(here, number * here.dense) == number * here.dense / per_rank
            assert cost_at(here, abs(number) * here.full) == abs(number) * here.full * per_rank


@by_storage
@pytest.mark.parametrize("convex", [True, False], ids=["convex errors", "any errors"])
def test_segments_bought_are_the_best_of_all_plans_that_cost_no_more(storage, convex):
    bought = 0
    for seed in range(12):
        sites = small_sites(storage, seed)
        tails, plans = tails_of(sites, seed, convex), every_plan(sites)
        for ratio in RATIOS:
            try:
                ranks = buy_segments(sites, tails, budget(sites, ratio))
            except SkippedCell:
                continue
            spent, bought = total_cost(sites, ranks), bought + 1
            assert spent <= budget(sites, ratio)
            best = min(error(tails, plan) for plan in plans if total_cost(sites, plan) <= spent)
            assert error(tails, ranks) == pytest.approx(best, rel=1e-12)
    assert bought > 50


@by_storage
@pytest.mark.parametrize("convex", [True, False], ids=["convex errors", "any errors"])
def test_water_filling_leaves_no_rank_unspent_and_little_error(storage, convex):
    for seed in range(12):
        sites = small_sites(storage, seed)
        tails, plans = tails_of(sites, seed, convex), every_plan(sites)
        for ratio in RATIOS:
            limit = budget(sites, ratio)
            if limit < sum(one.cost(1) for one in sites.values()):
                with pytest.raises(SkippedCell):
                    water_fill(sites, tails, limit)
                continue
            segments, ranks = buy_segments(sites, tails, limit), water_fill(sites, tails, limit)
            left = limit - total_cost(sites, ranks)
            assert left >= 0
            assert not next_rank_fits(sites, ranks, left)
            best = min(error(tails, plan) for plan in plans if total_cost(sites, plan) <= limit)
            # The rate of what could be bought next is at most that of the best change of one site.
            spare = limit - total_cost(sites, segments)
            rates = [
                (error(tails, segments) - error(tails, {**segments, name: k})) / more
                for name, one in sites.items()
                for k in (*range(1, one.last + 1), None)
                if (more := one.cost(k) - one.cost(segments[name])) > 0
            ]
            assert best <= error(tails, ranks) * (1 + 1e-12) + 1e-12
            assert error(tails, ranks) <= error(tails, segments) + 1e-12
            assert error(tails, segments) <= best + max(rates, default=0.0) * spare + 1e-9


def reference_fit(sites: dict[str, Site], wanted: dict[str, float], limit: int) -> Ranks:
    """``fit`` with costs from a table and the factor from a fine search over it."""
    ranks = {name: np.arange(one.full + 1) for name, one in sites.items()}
    costs = {name: np.array([one.cost(int(k)) for k in ranks[name]]) for name, one in sites.items()}

    def clipped(factor: float) -> dict[str, float]:
        return {name: float(np.clip(factor * wanted[name], 1, one.last)) for name, one in sites.items()}

    def cost(factor: float) -> float:
        return sum(np.interp(k, ranks[name], costs[name]) for name, k in clipped(factor).items())

    low, high = 0.0, 1e6
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    exact = clipped(low)
    found = {name: math.floor(k + 1e-9) for name, k in exact.items()}
    left = limit - sum(costs[name][k] for name, k in found.items())
    order = sorted(sites, key=lambda name: found[name] - exact[name])
    while True:
        before = dict(found)
        for name in order:
            step = (
                costs[name][found[name] + 1] - costs[name][found[name]]
                if found[name] < sites[name].last
                else left + 1
            )
            if step <= left:
                found[name] += 1
                left -= step
        if found == before:
            return dict(found)


@by_storage
def test_fitted_ranks_are_those_of_the_reference_and_leave_less_than_one_rank(storage):
    fitted = 0
    for seed in range(22):
        sites = small_sites(storage, seed, count=6)
        generator = np.random.default_rng(seed)
        wanted = {name: float(generator.uniform(0.1, 10)) for name in sites}
        for ratio in RATIOS:
            limit = budget(sites, ratio)
            if limit < sum(one.cost(1) for one in sites.values()):
                with pytest.raises(SkippedCell):
                    fit(sites, wanted, limit)
                continue
            ranks, fitted = fit(sites, wanted, limit), fitted + 1
            left = limit - total_cost(sites, ranks)
            assert left >= 0
            assert all(1 <= ranks[name] <= one.last for name, one in sites.items())
            assert not next_rank_fits(sites, ranks, left)
            assert ranks == reference_fit(sites, wanted, limit)
    assert fitted > 100


@by_storage
def test_strs_takes_its_last_step_only_as_far_as_the_budget_asks(storage):
    finished = 0
    for seed in range(20):
        sites, generator = small_sites(storage, seed, count=6), np.random.default_rng(seed)
        steps = sorted(
            (
                Step(name, k, float(generator.uniform(1, 5)) / k)
                for name, one in sites.items()
                for k in candidate_ranks(one, RATIOS)
            ),
            key=lambda step: step.sensitivity,
        )
        for ratio in RATIOS:
            limit = budget(sites, ratio)
            try:
                index = index_within_budget(sites, steps, limit)
            except SkippedCell:
                assert total_cost(sites, plan(sites, steps, len(steps))) > limit
                continue
            costs = [total_cost(sites, plan(sites, steps, i)) for i in range(len(steps))]
            assert index == next(i for i, cost in enumerate(costs) if cost <= limit)
            ranks, name, finished = finish(sites, steps, index, limit), steps[index].site, finished + 1
            before = plan(sites, steps, index - 1)[name]
            most = sites[name].last if before is None else before
            tried = [{**ranks, name: k} for k in range(plan(sites, steps, index)[name], most + 1)]
            assert ranks == max((r for r in tried if total_cost(sites, r) <= limit), key=lambda r: r[name])
    assert finished > 40


@by_storage
def test_uniform_and_loss_based_ranks_meet_the_budget(storage):
    sites = {f"{i}": site(out, inp, storage=storage, block=i) for i, (out, inp) in enumerate(shapes(4, 12, 20, 60))}
    losses = {name: 5.0 + 7 * one.block for name, one in sites.items()}
    for ratio in RATIOS[1:]:
        limit = budget(sites, ratio)
        assert total_cost(sites, uniform(sites, ratio)) <= limit
        ranks = loss_based(sites, ratio, losses)
        left = limit - total_cost(sites, ranks)
        assert left >= 0
        assert not next_rank_fits(sites, ranks, left)


@by_storage
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_site_that_no_rank_makes_cheaper_stays_dense_and_counts_so(storage, ratio):
    sites = {
        "wide": site(20, 30, "wide", storage),
        "thin": site(1, 30, "thin", Padded(0.5)),
        "high": site(40, 20, "high", storage),
    }
    assert [one.last > 0 for one in sites.values()] == [True, False, True]
    limit, wanted = budget(sites, ratio), {"wide": 2.0, "thin": 99.0, "high": 3.0}
    steps = [Step(name, k, 1 / k) for name, one in sites.items() for k in candidate_ranks(one, RATIOS)]
    steps = sorted(steps, key=lambda step: step.sensitivity)
    found = {
        "fit": fit(sites, wanted, limit),
        "uniform": uniform(sites, ratio),
        "water_fill": water_fill(sites, tails_of(sites, 0), limit),
        "loss_based": loss_based(sites, ratio, {"wide": 5.0, "high": 7.0}),
        "strs": finish(sites, steps, index_within_budget(sites, steps, limit), limit),
    }
    for name, ranks in found.items():
        assert list(ranks) == list(sites), name
        assert ranks["thin"] is None, name
        assert total_cost(sites, ranks) <= limit, name
        assert ranks["wide"] or ranks["high"], name
        assert 0 not in ranks.values(), name
    alone = {"thin": sites["thin"]}
    for allocate in (lambda: fit(alone, wanted, 29), lambda: uniform(alone, ratio)):
        with pytest.raises(SkippedCell, match="less than rank 1"):
            allocate()


@by_storage
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_learned_rank_starts_at_its_ratio_and_its_cost_has_the_slope_of_the_line(storage, ratio):
    for out, inp in shapes(5, 20, 30, 90):
        here = site(out, inp, storage=storage)
        rank = LearnedRank(here, ratio, 10.0, torch.device("cpu"))
        assert 0.01 < starting_share(here, ratio) < 0.99
        assert rank.cost.item() == pytest.approx(ratio * here.dense, rel=1e-4)
        [slope] = torch.autograd.grad(rank.cost, rank.parameter)
        [of_k] = torch.autograd.grad(rank.k, rank.parameter)
        whole = int(rank.k.item())
        assert slope.item() == pytest.approx((here.cost(whole + 1) - here.cost(whole)) * of_k.item(), rel=1e-6)
        for end, k in ((-1e4, 1), (1e4, here.last)):
            rank.parameter.data.fill_(end)
            assert rank.cost.item() == here.cost(k)


@pytest.fixture
def options(tmp_path: Path) -> str:
    """A folder of options that adds storages from outside the package."""
    (tmp_path / "conf" / "storage").mkdir(parents=True)
    for name in ("Pivoted", "AlmostPivoted", "OfInputs", "NotNarrow"):
        text = f"_target_: tests.test_costs.{name}\nleft_share: 0.5\n"
        (tmp_path / "conf" / "storage" / f"{name.lower()}.yaml").write_text(text)
    return f"hydra.searchpath=[file://{tmp_path}/conf]"


def test_the_key_of_an_allocation_has_what_is_counted(lab: Lab, options):
    """As it always was where a rank costs always the same; other storages do not share their ranks."""

    def counted(*overrides: str):
        [cell] = lab.cells("method=svdllm", options, *overrides)
        return LowRankKeys(cell).counted

    for storage in ("uv", "u", "v"):
        assert counted(f"storage={storage}") == ["parameters", 5]
    assert counted("storage=remap") == ["parameters", 3]
    assert counted("targets=kv_cache") == ["kv_cache", 5]
    assert Pivoted(0.5).cost(2, 3, 1) == AlmostPivoted(0.5).cost(2, 3, 1)
    keys = [counted(f"storage={storage}") for storage in ("uv", "remap", "pivoted", "almostpivoted", "ofinputs")]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose weights are large enough for the logarithms of loss_based."""
    folder = tmp_path_factory.mktemp("lively")
    tiny.build("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor * 10 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("allocation", "ratio"),
    [
        ("uniform", 0.9),
        ("global_tail", 0.9),
        ("global_tail", 0.5),
        ("loss_based", 0.5),
        ("strs", 0.5),
        ("sigma_gradient", 0.5),
        ("sigma_gradient allocation.form=global", 0.9),
        ("differentiable allocation.steps=2", 0.5),
    ],
)
def test_every_allocation_runs_with_a_concave_cost(lab: Lab, options, lively, allocation, ratio):
    words = ["method=svdllm", "storage=pivoted", *f"allocation={allocation}".split()]
    record = lab.run(*words, f"model.path={lively}", f"ratio={ratio}", options)
    assert record["status"] == "done", record.get("reason")
    ranks, sites = record["compressions"]["lowrank"]["plan"], record["compressions"]["lowrank"]["sites"]
    shapes = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
    spent = 0
    for name, rank in ranks.items():
        out, inp = shapes.get(name.rpartition(".")[2], (0, 0))
        if out and rank is not None:
            assert sites[name]["cost"] == Pivoted(0.5).cost(out, inp, rank)
        spent += sites[name]["cost"]
    dense = sum(one["dense"] for one in sites.values())
    assert record["sizes"]["ratio_reached"] == spent / dense <= ratio
    if allocation != "uniform":
        assert spent / dense > ratio - 0.02
    if (
        ratio == 0.9 and allocation == "uniform"
    ):  # more than two plain factors can have: there rank 24 saves nothing
        assert max(ranks[name] for name in ranks if name.endswith("q_proj")) > 48 * 48 // 96


@pytest.mark.parametrize(
    "allocation",
    [
        "uniform",
        "loss_based",
        "strs",
        "sigma_gradient",
        "differentiable allocation.steps=2",
    ],
)
def test_linears_that_no_rank_makes_cheaper_stay_dense_in_a_cell(lab: Lab, options, lively, allocation):
    words = ["method=svdllm", "storage=notnarrow", *f"allocation={allocation}".split()]
    if "differentiable" in allocation:
        small = {"seqlen": 32, "max_windows": 2, "points": 3}
        words += ["eval=[ppl,learned_ranks]", *(f"eval.learned_ranks.{name}={n}" for name, n in small.items())]
    record = lab.run(*words, f"model.path={lively}", "ratio=0.5", options)
    assert record["status"] == "done", record.get("reason")
    ranks = record["compressions"]["lowrank"]["plan"]
    assert {rank for name, rank in ranks.items() if name.endswith(("k_proj", "v_proj"))} == {None}
    assert 0 not in ranks.values()
    assert 0.45 < record["sizes"]["ratio_reached"] <= 0.5
    if "differentiable" in allocation:
        steps = record["compressions"]["lowrank"]["training"]["steps"]
        assert steps[0]["ratio"] == pytest.approx(steps[1]["ratio"], abs=0.1)
        along = record["metrics"]["learned_ranks"]
        assert along["value"] == pytest.approx(along["perplexity"][-1])


class Broken(Absorb):
    """Costs out of contract: of nothing, falling, or no whole numbers."""

    costs: ClassVar[dict[str, Any]] = {
        "nothing": lambda out, inp, rank: 0,
        "falling": lambda out, inp, rank: rank * (200 - 5 * rank),
        "fraction": lambda out, inp, rank: rank * (out + inp) * 0.5,
    }

    def __init__(self, fault: str) -> None:
        super().__init__(0.5)
        self.fault = fault

    def cost(self, out: int, inp: int, rank: int) -> int:
        return self.costs[self.fault](out, inp, rank)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nothing", "rank 1 of a 48x48 linear costs 0; it must be a whole number, above 0"),
        ("falling", "rank 32 of a 48x48 linear costs 1280, less than the 1920 of rank 16; a cost must never fall"),
        ("fraction", "rank 0 of a 48x48 linear costs 0.0; it must be a whole number from 0"),
    ],
)
def test_a_cost_out_of_contract_is_refused_before_any_work(lab: Lab, tmp_path, fault, says):
    (tmp_path / "conf" / "storage").mkdir(parents=True)
    (tmp_path / "conf" / "storage" / "broken.yaml").write_text(
        f"_target_: tests.test_costs.Broken\nfault: {fault}\n"
    )
    options = f"hydra.searchpath=[file://{tmp_path}/conf]"
    with pytest.raises(UserError) as raised:
        lab.run("method=svdllm", "storage=broken", "ratio=0.5", options)
    assert str(raised.value) == f"storage: Broken says that {says}"


def test_costs_of_old_and_new_records_are_read():
    old, new = {"dense": 70, "per_rank": 9}, {"dense": 70, "cost": 27}
    for one in (old, new):
        assert asvd._cost(one, 3) == 27
        assert asvd._cost(one, None) == 70
    sensitivities = {"n": {"3": 1.5}}
    before = {"sensitivities": sensitivities, "sites": {"n": old}}
    after = {
        "sensitivities": sensitivities,
        "sites": {"n": {**new, "cost": 54}},
        "candidate_costs": {"n": {"3": 27}},
    }
    assert asvd._candidate_cost(before, "n", "3") == asvd._candidate_cost(after, "n", "3") == 27
