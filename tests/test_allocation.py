"""Allocations: the budget is met, and what is bought is the best that it buys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowrank_lab.allocation.global_tail import buy_segments, water_fill
from lowrank_lab.allocation.uniform import uniform
from lowrank_lab.errors import SkippedCell
from lowrank_lab.lowrank.ranks import budget, total_cost
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
        assert not growable or limit - spent < max(here[name].per_rank for name in growable)
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
