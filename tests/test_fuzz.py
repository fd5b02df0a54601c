"""A thousand mistakes: each ends in one line that a user can act on, and none starts work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from lowrank_lab.basics.errors import UserError
from lowrank_lab.running import runner

from . import mistakes
from .conftest import Lab, planned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def every(strategy: SearchStrategy[Any], examples: int, check: Callable[[Any], None]) -> None:
    """Call ``check`` with so many different examples; prints their number; fails with all that failed."""
    seen: set[str] = set()
    faults: dict[str, str] = {}

    @settings(
        max_examples=2 * examples,  # some come twice
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # to make an example smaller would take longer than to read it
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(example: Any) -> None:
        if len(seen) == examples or repr(example) in seen:
            return
        seen.add(repr(example))
        try:
            check(example)
        except Exception as error:
            faults[repr(example)] = f"{type(error).__name__}: {error}"

    each()
    print(f"{len(seen)} mistakes")
    assert len(seen) == examples
    assert not faults, "\n".join(f"{example}: {fault}" for example, fault in faults.items())


def reason(words: list[str], run: bool = False) -> str:
    """The line with which a command line is refused: when it is planned or, with ``run``, before any work."""
    try:
        [cell] = planned(words)
        if run:
            runner.run(cell)
    except (UserError, OSError) as error:  # run.py prints both as one line
        line = str(error)
    else:
        raise ValueError("it is accepted")
    if "\n" in line:
        raise ValueError(f"more than one line: {line}")
    return line


@pytest.fixture
def planned_only(tmp_path: Path, data_root: Path) -> list[str]:
    return ["model=tiny", "dataset=wikitext2", f"data_root={data_root}", f"results={tmp_path}/results"]


def test_values_of_another_type(planned_only):
    every(mistakes.wrong_values(), 400, lambda words: reason([*planned_only, *words]))


def test_misspelled_options(planned_only):
    def check(example: tuple[str, str]) -> None:
        word, meant = example
        line = reason([*planned_only, word])
        assert meant in line, line

    every(mistakes.wrong_options(), 150, check)


def test_misspelled_settings(planned_only):
    def check(example: tuple[tuple[str, ...], str]) -> None:
        words, meant = example
        line = reason([*planned_only, *words])
        assert meant.rpartition(".")[2] in line, line

    every(mistakes.wrong_keys(), 200, check)


def test_words_that_are_no_override(planned_only):
    every(mistakes.wrong_words(), 150, lambda words: reason([*planned_only, *words]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_folders(lab: Lab, checkpoints, tmp_path, family):
    def check(broken: mistakes.Broken) -> None:
        folder = mistakes.copied(checkpoints[family], tmp_path / "model", broken)
        reason(lab.overrides(f"model.path={folder}", "method=svdllm"), run=True)
        assert not list(lab.root.glob("records/*")), "it left a record"

    every(mistakes.broken_folders(checkpoints[family]), 100, check)


def test_data_files(tmp_path, data_root):
    def check(broken: mistakes.Broken) -> None:
        root = mistakes.copied(data_root, tmp_path / "data", broken)
        lab = Lab(tmp_path / "results", root)
        reason(lab.overrides("method=svdllm"))

    every(mistakes.broken_data(data_root), 60, check)
