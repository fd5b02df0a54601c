"""Allocations: the budget is met, and what is bought is the best that it buys."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.lowrank.allocation.global_tail import GlobalTail, buy_segments, water_fill
from lowrank_lab.lowrank.allocation.loss_based import loss_based
from lowrank_lab.lowrank.allocation.strs import (
    Step,
    candidate_ranks,
    finish,
    index_within_budget,
    index_within_perplexity,
    plan,
)
from lowrank_lab.lowrank.allocation.uniform import uniform
from lowrank_lab.lowrank.ranks import budget, fit, total_cost
from lowrank_lab.modules.site import Site
from tests.sites import site as site_of
from tests.sites import sites

SHAPES = {"q": (24, 24), "k": (8, 24), "up": (60, 24), "down": (24, 60)}


def tails_of(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Errors by rank of random spectra that decay at different speeds and scales."""
    generator = np.random.default_rng(seed)
    tails = {}
    for name, shape in shapes.items():
        decay = generator.uniform(0.2, 3)
        eigenvalues = generator.uniform(0.1, 10) * np.sort(generator.random(min(shape)))[::-1] ** decay
        tails[name] = np.append(np.cumsum(eigenvalues[::-1])[::-1], 0.0)
    return tails


def error(tails: dict[str, np.ndarray], ranks: dict[str, int | None]) -> float:
    return sum(float(tails[name][rank]) for name, rank in ranks.items() if rank is not None)


def filled(shapes, ratio, tails):
    return water_fill(sites(shapes), tails, budget(sites(shapes), ratio))


@pytest.mark.parametrize("allocation", ["uniform", "global_tail"])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_met_and_not_exceeded(allocation, ratio, seed):
    here = sites(SHAPES)
    ranks = uniform(here, ratio) if allocation == "uniform" else filled(SHAPES, ratio, tails_of(SHAPES, seed))
    limit = ratio * sum(out * inp for out, inp in SHAPES.values())
    spent = total_cost(here, ranks)
    assert spent <= limit
    if allocation == "global_tail":  # to within the dearest rank, or what would make a linear dense
        growable = [name for name, rank in ranks.items() if rank is not None and rank < here[name].last]
        assert not growable or limit - spent < max(here[name].cost(1) for name in growable)
    for name, rank in ranks.items():
        assert rank is None or rank >= 1
        assert here[name].cost(rank) <= here[name].dense


@pytest.mark.parametrize("seed", range(20))
def test_water_filling_beats_uniform(seed):
    """On enough linears that a single one, left dense or not, does not decide."""
    shapes = {f"{name}{i}": shape for i in range(8) for name, shape in SHAPES.items()}
    tails = tails_of(shapes, seed)
    for ratio in (0.3, 0.5, 0.8):
        assert error(tails, filled(shapes, ratio, tails)) < error(tails, uniform(sites(shapes), ratio))


@pytest.mark.parametrize("seed", range(10))
def test_segments_bought_are_optimal_for_what_they_cost(seed):
    """Against every rank plan, on shapes small enough to try them all."""
    shapes = {"a": (6, 6), "b": (4, 6), "c": (5, 9)}
    tails = tails_of(shapes, seed)
    choices = []
    for name, (out, inp) in shapes.items():
        last = (out * inp - 1) // (out + inp)
        choices.append([*((name, k) for k in range(1, last + 1)), (name, None)])
    plans = [dict(plan) for plan in itertools.product(*choices)]
    for limit in range(40, 106, 3):
        ranks = buy_segments(sites(shapes), tails, limit)
        spent = total_cost(sites(shapes), ranks)
        assert spent <= limit
        best = min(error(tails, plan) for plan in plans if total_cost(sites(shapes), plan) <= spent)
        assert error(tails, ranks) == pytest.approx(best, rel=1e-12)


def test_a_linear_whose_error_is_worth_it_becomes_dense():
    shapes = {"flat": (24, 24), "steep": (24, 24)}
    flat = np.append(np.arange(24, 0, -1.0) * 100, 0)  # every direction matters alike
    steep = np.append(10.0 ** -np.arange(24.0), 0)  # one direction is nearly all
    ranks = filled(shapes, 0.6, {"flat": flat, "steep": steep})
    assert ranks["flat"] is None
    assert ranks["steep"] is not None


def test_equal_linears_get_equal_ranks_within_one():
    shapes = {f"layer{i}": (24, 24) for i in range(5)}
    tail = tails_of({"a": (24, 24)})["a"]
    ranks = filled(shapes, 0.5, dict.fromkeys(shapes, tail))
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_too_small_a_ratio_is_skipped():
    with pytest.raises(SkippedCell, match="less than rank 1 for every linear"):
        filled(SHAPES, 0.01, tails_of(SHAPES))


def test_ratio_one_is_dense():
    assert set(filled(SHAPES, 1.0, tails_of(SHAPES)).values()) == {None}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(10))
def test_fit_spends_the_budget_within_one_rank_and_keeps_proportions(ratio, seed):
    here = sites({f"{name}{i}": shape for i in range(4) for name, shape in SHAPES.items()})
    generator = np.random.default_rng(seed)
    wanted = {name: float(generator.uniform(0.1, 10)) for name in here}
    limit = budget(here, ratio)
    ranks = fit(here, wanted, limit)
    assert all(1 <= ranks[name] <= site.last for name, site in here.items())
    left = limit - total_cost(here, ranks)
    growable = [here[name].cost(1) for name in here if ranks[name] < here[name].last]
    assert 0 <= left < min(growable, default=limit)
    # Between the ends the ranks are in the proportions asked for, but that rounding takes up to one rank, and gives
    # up to one to each and another to those that are cheap enough for what is still left.
    inner = [name for name in here if 1 < ranks[name] < here[name].last]
    low = max((ranks[name] - 2) / wanted[name] for name in inner)
    high = min((ranks[name] + 1) / wanted[name] for name in inner)
    assert low <= high


def test_fit_at_ratio_one_is_dense_and_too_small_a_budget_is_skipped():
    here = sites(SHAPES)
    wanted = dict.fromkeys(here, 1.0)
    assert set(fit(here, wanted, budget(here, 1.0)).values()) == {None}
    with pytest.raises(SkippedCell, match="less than rank 1"):
        fit(here, wanted, 10)


def test_fit_without_any_importance_gives_all_the_same_ratio():
    here = sites({f"{name}{i}": shape for i in range(4) for name, shape in SHAPES.items()})
    limit = budget(here, 0.6)
    same = uniform(here, 0.6)
    for name, rank in fit(here, dict.fromkeys(here, 0.0), limit).items():
        assert same[name] <= rank <= same[name] + 1  # what rounding leaves buys further ranks
    tiny = dict.fromkeys(here, 1e-40)
    assert fit(here, tiny, limit) == fit(here, dict.fromkeys(here, 1.0), limit)
    with pytest.raises(FloatingPointError, match=next(iter(here))):
        fit(here, dict.fromkeys(here, math.nan), limit)


def layers(count: int) -> dict[str, Site]:
    """Sites of several blocks, two types of matrix in each."""
    return {
        f"layers.{block}.{name}": site_of(out, inp, name, block=block)
        for block in range(count)
        for name, (out, inp) in {"q": (24, 24), "up": (60, 24)}.items()
    }


def test_loss_based_is_the_papers_rule():
    here = layers(3)
    losses = {name: 10.0 + 40 * site.block for name, site in here.items()}
    ratio = 0.5
    ranks = loss_based(here, ratio, losses)
    limit = budget(here, ratio)
    assert limit - max(site.cost(1) for site in here.values()) < total_cost(here, ranks) <= limit
    shares = [1 / math.log(10 + 40 * block) for block in range(3)]
    for name, site in here.items():  # removed = n · 0.5 · share / Σ shares, rounded to a rank
        kept = 1 - 3 * (1 - ratio) * shares[site.block] / sum(shares)
        assert abs(ranks[name] - kept * site.dense / site.cost(1)) <= 1.5
    assert ranks["layers.0.up"] < ranks["layers.1.up"] < ranks["layers.2.up"]


def test_loss_based_with_equal_losses_is_uniform_within_one_rank():
    here = layers(3)
    even = uniform(here, 0.5)
    for name, rank in loss_based(here, 0.5, dict.fromkeys(here, 7.0)).items():
        assert 0 <= rank - even[name] <= 1


def test_loss_based_needs_losses_whose_logarithm_is_positive():
    with pytest.raises(SkippedCell, match=r"losses above 1.*layers\.0\.q"):
        loss_based(layers(2), 0.5, {**dict.fromkeys(layers(2), 7.0), "layers.0.q": 0.9})


def random_steps(here: dict[str, Site], seed: int) -> list[Step]:
    """Sensitivities that mostly rise as the rank falls, with noise as measured ones have it."""
    generator = np.random.default_rng(seed)
    steps = [
        Step(name, rank, float(generator.uniform(1, 5) / rank + generator.normal(0, 0.02)))
        for name, site in here.items()
        for rank in candidate_ranks(site, [r / 10 for r in range(1, 10)])
    ]
    return sorted(steps, key=lambda step: step.sensitivity)


@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(10))
def test_strs_converges_to_the_first_plan_within_the_budget(ratio, seed):
    here = layers(4)
    steps = random_steps(here, seed)
    limit = budget(here, ratio)
    index = index_within_budget(here, steps, limit)
    costs = [total_cost(here, plan(here, steps, i)) for i in range(len(steps))]
    assert index == next(i for i, cost in enumerate(costs) if cost <= limit)
    ranks = finish(here, steps, index, limit)
    assert limit - here[steps[index].site].cost(1) < total_cost(here, ranks) <= limit
    for name, rank in plan(here, steps, index).items():  # at least what the converged index says
        assert ranks[name] == rank or name == steps[index].site


def test_strs_truncates_the_least_sensitive_first():
    here = sites({"soft": (24, 24), "hard": (24, 24)})
    steps = [Step("soft", 6, 1.0), Step("soft", 3, 1.1), Step("hard", 6, 5.0), Step("hard", 3, 9.0)]
    assert plan(here, steps, 1) == {"soft": 3, "hard": None}
    assert finish(here, steps, 1, budget(here, 0.65))["hard"] is None


def test_strs_below_its_lowest_candidates_is_skipped_with_what_it_reaches():
    here = layers(2)
    steps = random_steps(here, 0)
    with pytest.raises(SkippedCell, match=r"reach down to ratio 0\.\d+"):
        index_within_budget(here, steps, budget(here, 0.05))


@pytest.mark.parametrize("target", [0.5, 3.0, 7.5, 99.0])
def test_strs_finds_the_last_plan_within_a_perplexity(target):
    perplexities = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
    within = index_within_perplexity(5, target, lambda i: perplexities[i])
    assert within == max((i for i, p in enumerate(perplexities) if p <= target), default=-1)
    assert index_within_perplexity(2, 99.0, lambda i: perplexities[i]) == 2


def test_global_tail_weights_move_rank():
    here = layers(3)
    tails = tails_of({name: (site.out, site.inp) for name, site in here.items()})
    plain = GlobalTail({})._weighted(tails)
    heavy = GlobalTail({"*.up": 50.0})._weighted(tails)
    limit = budget(here, 0.5)
    without, with_weights = water_fill(here, plain, limit), water_fill(here, heavy, limit)
    spent = lambda ranks: sum(here[name].cost(rank) for name, rank in ranks.items() if name.endswith("up"))
    assert spent(with_weights) > spent(without)
    with pytest.raises(UserError, match=r"no linear matches \*\.nothing"):
        GlobalTail({"*.nothing": 2.0})._weighted(tails)
