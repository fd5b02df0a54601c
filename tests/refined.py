"""Refinements run by themselves, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.records.results import Record
from lowrank_lab.running import training
from lowrank_lab.running.context import Context

from .conftest import Lab

CPU = torch.device("cpu")


def context_of(lab: Lab, *overrides: str) -> Context:
    [cell] = lab.cells(*overrides)
    return Context(cell, Record(cell, None), CPU)


def refined(lab: Lab, folder: Path, *overrides: str) -> tuple[Context, dict[str, int | None]]:
    """Run the refinement of a cell into ``folder``."""
    context = context_of(lab, *overrides)
    ranks = answers_of(context.cell).allocation(context)
    folder.mkdir(exist_ok=True)
    answers_of(context.cell).refinement(context, ranks, folder)
    return context, ranks


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}.{k}": t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def check_resumed(
    monkeypatch: pytest.MonkeyPatch, lab: Lab, whole: Path, resumed: Path, words: tuple[str, ...], stop_at: int
) -> list[int]:
    """Stop a refinement before its training step number ``stop_at``, and run it again: it ends as ``whole`` is.

    Returns the steps that were made, of both runs.
    """
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    seen: list[int] = []
    rows = training._rows

    def counted(step: int, *rest: Any) -> torch.Tensor:
        if len(seen) == stop_at:
            seen.append(-1)
            raise KeyboardInterrupt
        seen.append(step)
        return rows(step, *rest)

    monkeypatch.setattr(training, "_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        refined(lab, resumed, *words)
    assert list(resumed.glob("*.state"))
    refined(lab, resumed, *words)
    expected, found = tensors(whole), tensors(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (resumed / "facts.json").read_text() == (whole / "facts.json").read_text()
    assert {f.name for f in resumed.iterdir()} == {f.name for f in whole.iterdir()}
    return [step for step in seen if step >= 0]
