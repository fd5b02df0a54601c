"""Grids with lines that have not all axes of the others: which jobs they have, also when they are narrowed."""

from __future__ import annotations

import importlib

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins import lowrank_lab_sweeper
from lowrank_lab.cells.sweep import jobs

PARAMS = {"method": "asvd", "ratio": 0.9, "metric": "abs_mean,abs_max", "metric.alpha": "0.5,1"}
ALSO = [{"method": "svd_strs", "metric": None, "metric.alpha": None}]
ASVD = [
    ["method=asvd", "ratio=0.9", f"metric={metric}", f"metric.alpha={alpha}"]
    for metric in ("abs_mean", "abs_max")
    for alpha in ("0.5", "1")
]
STRS = ["method=svd_strs", "ratio=0.9"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [*ASVD, STRS]),
        (["seed=3"], [[*job, "seed=3"] for job in (*ASVD, STRS)]),
        (["method=svd_strs"], [STRS]),
        (["method=asvd"], ASVD),
        (["method=asvd,svd_strs"], [*ASVD, STRS]),
        (["metric=abs_max"], ASVD[2:]),
        (["metric.alpha=1"], [ASVD[1], ASVD[3]]),
        (["metric.alpha=2", "metric=abs_max"], [[*ASVD[2][:3], "metric.alpha=2"]]),
        (["method=asvd_uniform"], [["method=asvd_uniform", *job[1:]] for job in ASVD]),
        (["method=svd_strs", "metric.alpha=1"], [["method=svd_strs", *ASVD[number][1:]] for number in (1, 3)]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_words_choose_among_the_grids_and_the_sweeper_runs_what_was_planned(words, expected):
    assert jobs(PARAMS, ALSO, words) == expected
    swept = [f"{name}={value}" for name, value in PARAMS.items()]
    parsed = OverridesParser.create().parse_overrides(swept + words)
    # Hydra runs its sweepers once more when it looks for plugins, and a class of before then has another parent.
    sweeper = importlib.reload(lowrank_lab_sweeper).PlannedSweeper(max_batch_size=None, params=PARAMS, also=ALSO)
    assert sweeper.split_arguments(parsed, None) == [expected]
