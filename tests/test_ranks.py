"""Ratio ↔ rank ↔ parameters."""

from __future__ import annotations

import pytest

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.lowrank.ranks import rank_for_ratio, total_cost
from tests.sites import site, sites

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (11, 9), (4096, 11008)]


@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_the_largest_rank_within_the_budget(out, inp):
    for percent in range(30, 100):
        rank = rank_for_ratio(site(out, inp), percent / 100)
        budget = percent * out * inp  # in hundredths, exact integers
        assert rank is not None
        assert 100 * site(out, inp).cost(rank) <= budget < 100 * site(out, inp).cost(rank + 1), percent


@pytest.mark.parametrize(("out", "inp"), SHAPES)
def test_ratio_one_stays_dense(out, inp):
    assert rank_for_ratio(site(out, inp), 1.0) is None
    assert site(out, inp).cost(None) == out * inp


def test_a_factorization_that_saves_nothing_stays_dense():
    # k = 288 has 288 · 1152 = 576² weights exactly: as many as dense.
    assert rank_for_ratio(site(576, 576), 0.9999999999999) is None


def test_a_ratio_without_a_rank_is_skipped_with_the_smallest_that_has_one():
    with pytest.raises(SkippedCell, match=r"0\.0035"):
        rank_for_ratio(site(576, 576), 0.001)
    assert rank_for_ratio(site(576, 576), 0.0035) == 1


def test_total_counts_dense_and_factorized():
    assert total_cost(sites({"a": (4, 6), "b": (3, 3)}), {"a": 2, "b": None}) == 2 * 10 + 9
