"""Perplexity against its definition."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch

from lowrank_lab.evaluation.perplexity import Perplexity, perplexity
from lowrank_lab.evaluation.robust import in_batches
from lowrank_lab.evaluation.windows import windows_of
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


def test_logits_that_are_not_finite_give_nan_and_the_layer(model):
    """A weight of one layer is broken: the value is missing, and the layer is named, not one of those after it."""
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    measured = perplexity(broken, torch.ones(2, 8, dtype=torch.long), 1, CPU)
    assert measured == {"value": None, "mean_nll": None, "not_finite": "model.layers.1.mlp.up_proj"}


def test_out_of_memory_halves_the_batch_and_goes_on(model, caplog):
    windows = torch.randint(4, 260, (7, 24), generator=torch.Generator().manual_seed(0))
    sizes = []

    class Small(torch.nn.Module):
        def forward(self, ids, use_cache):
            sizes.append(len(ids))
            if len(ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return model(ids, use_cache=use_cache)

    measured = perplexity(Small(), windows, 6, CPU)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "going on with 1" in caplog.text
    assert measured["value"] == pytest.approx(perplexity(model, windows, 1, CPU)["value"], rel=1e-6)


def test_one_window_that_does_not_fit_raises():
    def run(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(torch.zeros(4, 8), 4, run))


def test_a_perplexity_beyond_float64_is_its_largest_number(model):
    huge = copy.deepcopy(model)
    huge.lm_head.weight.data *= 1e6
    measured = perplexity(huge, torch.randint(4, 260, (2, 24)), 1, CPU)
    assert measured["mean_nll"] > 710
    assert measured["value"] == sys.float_info.max


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
