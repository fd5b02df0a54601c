"""Perplexity against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank_lab.evaluation.perplexity import perplexity, windows_of
from lowrank_lab.evaluation.ppl import Perplexity
from lowrank_lab.models import tiny
from lowrank_lab.models.load import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.build("llama", folder)
    return load_model(str(folder), None, "float32", False)


def test_windows_are_consecutive_and_the_tail_is_dropped():
    ids = np.arange(103)
    windows = windows_of(ids, 10, None, None)
    assert windows.tolist() == ids[:100].reshape(10, 10).tolist()
    assert windows_of(ids, 10, 4, None).tolist() == windows[:4].tolist()
    assert len(windows_of(ids, 200, None, None)) == 0


def test_bos_before_every_window_takes_the_place_of_one_token():
    windows = windows_of(np.arange(100), 10, None, 77)
    assert windows.shape == (11, 10)
    assert (windows[:, 0] == 77).all()
    assert windows[:, 1:].flatten().tolist() == list(range(99))


def test_value_is_the_exponential_of_the_token_mean(model):
    """Against transformers' own loss, window by window, and whatever the batch size."""
    windows = torch.randint(4, 260, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 5):
        measured = perplexity(model, windows, batch_size, CPU)
        assert measured["value"] == pytest.approx(expected, rel=1e-5)
        assert measured["predicted_tokens"] == 5 * 23


def test_a_loss_that_is_not_finite_raises(model):
    class Broken(torch.nn.Module):
        def forward(self, ids, use_cache):
            out = model(ids, use_cache=use_cache)
            out.logits[..., 0] = torch.nan
            return out

    with pytest.raises(FloatingPointError, match="window 0"):
        perplexity(Broken(), torch.ones(2, 8, dtype=torch.long), 1, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seqlen": 1}, "seqlen"), ({"max_windows": 0}, "max_windows"), ({"bos": "no"}, "bos"),
     ({"batch_size": 0}, "batch_size")],
)  # fmt: skip
def test_values_out_of_range_are_rejected(change, message):
    good = {"seqlen": 16, "max_windows": None, "bos": "text", "batch_size": 1}
    Perplexity(**good)
    with pytest.raises(ValueError, match=message):
        Perplexity(**{**good, **change})
