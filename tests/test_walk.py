"""Batches with padding: each has its own masks, and what is padding counts in no statistic and no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowrank_lab.calibration.gradients import load_gradients, make_gradients
from lowrank_lab.calibration.statistics import load_statistics, make_statistics, tokens_metadata, tokens_of
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM, of_tokens
from lowrank_lab.models.walk import _embed, block_file, blocks_of, walk
from lowrank_lab.quantization.inputs import ROWS, gather_inputs, sample_inputs
from tests.sites import sites_in

CPU = torch.device("cpu")
LENGTHS = (9, 14, 6, 14)
SEQUENCES = [
    torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(length + i))
    for i, length in enumerate(LENGTHS)
]
SOME = ["llama", "opt", "gemma2"]  # also flattened sequences, positions from the mask, and two kinds of masks


@pytest.fixture(params=SOME)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, checkpoints: dict[str, Path]) -> Any:
    return load_model(str(checkpoints[family]), None, "float32", False)


def padded(sequences: Sequence[Tensor], left: bool = False) -> dict[str, Tensor]:
    """A batch of ``sequences`` (1, length), padded to the longest."""
    longest = max(one.shape[1] for one in sequences)
    ids = torch.full((len(sequences), longest), 7)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, one in enumerate(sequences):
        here = slice(longest - one.shape[1], longest) if left else slice(0, one.shape[1])
        ids[row, here], mask[row, here] = one[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def two_batches() -> list[dict[str, Tensor]]:
    """Two batches of one size whose masks differ."""
    return [padded(SEQUENCES[:2]), padded(SEQUENCES[2:])]


@torch.no_grad()
def test_two_batches_of_one_size_with_different_masks(model, family):
    tower, batches = FAMILIES[family].tower, two_batches()
    assert batches[0]["input_ids"].shape == batches[1]["input_ids"].shape
    expected: list[Tensor] = []
    for block in blocks_of(model, tower):
        block.register_forward_hook(lambda _module, _args, out: expected.append(out))
    for batch in batches:
        model(**batch, use_cache=False)
    expected_of, expected = expected, []
    count = len(blocks_of(model, tower))
    hidden: list[Tensor] = []
    for index, _, run in walk(model, tower, batches, CPU, hidden):
        run()
        for number, batch in enumerate(batches):
            theirs, counts = expected_of[number * count + index], batch["attention_mask"].bool()
            torch.testing.assert_close(hidden[number][counts], theirs[counts], rtol=1e-5, atol=1e-6)


def test_batches_without_padding_share_their_masks(model, family):
    tower = FAMILIES[family].tower
    ids = torch.randint(4, 260, (6, 20), generator=torch.Generator().manual_seed(1))
    calls = _embed(model, tower, ids.split(2), lambda states: states, CAUSAL_LM).calls
    assert all(one is first for of_batch in calls for one, first in zip(of_batch, calls[0], strict=True))
    calls = _embed(model, tower, two_batches(), lambda states: states, CAUSAL_LM).calls
    assert all(one is not other for one, other in zip(*calls, strict=True))


def test_padding_is_in_no_statistic(model, family, tmp_path):
    tower = FAMILIES[family].tower
    found, expected = tmp_path / "padded", tmp_path / "alone"
    for folder, batches in ((found, two_batches()), (expected, [of_tokens(one) for one in SEQUENCES])):
        folder.mkdir()
        make_statistics(folder, model, tower, batches, CPU)
    for index in range(len(blocks_of(model, tower))):
        for group in tower.inputs:
            ours, theirs = (load_statistics(folder, index, group, CPU) for folder in (found, expected))
            assert ours.tokens == theirs.tokens == sum(LENGTHS)
            close = {"rtol": 1e-4, "atol": 1e-6 * float(theirs.abs_max.max()) ** 2}
            torch.testing.assert_close(ours.second_moment, theirs.second_moment, **close)
            torch.testing.assert_close(ours.abs_mean, theirs.abs_mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours.abs_max, theirs.abs_max, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_in_no_gradient(model, family, tmp_path, left):
    tower, found, expected = FAMILIES[family].tower, tmp_path / "padded", tmp_path / "alone"
    longer = torch.full((1, 16), 9)  # so that each sequence is padded
    each = [{name: tensor[:1] for name, tensor in padded([one, longer], left).items()} for one in SEQUENCES]
    for folder, batches in ((found, each), (expected, [of_tokens(one) for one in SEQUENCES])):
        folder.mkdir()
        make_gradients(folder, model, tower, batches, CPU, outer=True, weight=True)
    for index in range(len(blocks_of(model, tower))):
        for linear in tower.linears:
            ours, theirs = (load_gradients(folder, index, linear, CPU) for folder in (found, expected))
            assert ours.tokens == theirs.tokens == sum(LENGTHS)
            for part in ("square", "row_fisher", "outer"):
                one, other = getattr(ours, part), getattr(theirs, part)
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@torch.no_grad()
def test_padding_is_in_no_sample_of_inputs(checkpoints):
    model, tower = load_model(str(checkpoints["llama"]), None, "float32", False), FAMILIES["llama"].tower
    paths, tokens = ["self_attn.q_proj", "mlp.down_proj"], sum(LENGTHS)
    assert tokens <= ROWS
    found = []
    for batches in (two_batches(), [of_tokens(one) for one in SEQUENCES]):
        _, block, run = next(walk(model, tower, batches, CPU))
        again = lambda run=run: run(advance=False)
        gathered = gather_inputs(block, paths, again, tokens, True, CPU)
        found.append((gathered, sample_inputs(block, paths, again, tokens, tokens)))
    (inputs, looked), (expected_inputs, expected_looked) = found
    close = {"rtol": 1e-4, "atol": 1e-6}
    for path in paths:
        for part in ("rows", "second_moment"):
            torch.testing.assert_close(getattr(inputs[path], part), getattr(expected_inputs[path], part), **close)
        for ours, theirs in zip(looked[path], expected_looked[path], strict=True):
            torch.testing.assert_close(ours, theirs, **close)


def test_padded_batches_of_experts_say_that_they_cannot_be_told(checkpoints):
    from lowrank_lab.models.rows import without_padding

    rows = torch.tensor([[True, True, False]])
    assert without_padding(torch.ones(1, 3, 4), rows).shape == (2, 4)
    with pytest.raises(ValueError, match="2 rows of a batch of 3"):
        without_padding(torch.ones(2, 4), rows)


# The loss


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@torch.no_grad()
def test_the_loss_without_padding_is_the_usual_one_to_the_bit(model, reduction):
    ids = torch.cat([SEQUENCES[1], SEQUENCES[3]])
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)
    loss = CAUSAL_LM.loss(model, of_tokens(ids), reduction)
    assert torch.equal(loss.flatten(), expected.flatten())
    assert CAUSAL_LM.predicted(of_tokens(ids)) == 2 * (LENGTHS[1] - 1)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_the_loss_of_a_padded_batch_is_that_of_its_sequences(checkpoints, left):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    batch = padded(SEQUENCES, left)
    alone = [CAUSAL_LM.loss(model, of_tokens(one), "sum") for one in SEQUENCES]
    predicted = CAUSAL_LM.predicted(batch)
    assert predicted == sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(CAUSAL_LM.loss(model, batch, "sum"), sum(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(CAUSAL_LM.loss(model, batch), sum(alone) / predicted, rtol=1e-5, atol=1e-5)
    of_tokens_alone = CAUSAL_LM.loss(model, batch, "none")
    torch.testing.assert_close(of_tokens_alone.sum(1), torch.stack(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_labels_say_what_is_predicted(checkpoints):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    labels = SEQUENCES[1].clone()
    labels[:, :5] = -100
    expected = model(SEQUENCES[1], labels=labels).loss
    torch.testing.assert_close(CAUSAL_LM.loss(model, {"input_ids": SEQUENCES[1], "labels": labels}), expected)


# Tokens in the files


def test_linears_that_saw_different_numbers_of_tokens_are_kept_apart():
    assert tokens_metadata({"a": 5, "b": 5}) == {"tokens": "5"}
    apart = tokens_metadata({"a": 5, "b": 3})
    assert (tokens_of(apart, "a"), tokens_of(apart, "b")) == (5, 3)
    assert tokens_of({"tokens": "7"}, "a") == 7


def test_the_file_of_statistics_is_as_it_was(checkpoints, tmp_path):
    """Artifacts are shared by key: the same names, the same metadata."""
    from safetensors import safe_open

    model, tower = load_model(str(checkpoints["llama"]), None, "float32", False), FAMILIES["llama"].tower
    make_statistics(tmp_path, model, tower, [SEQUENCES[1]], CPU)
    with safe_open(tmp_path / block_file(0), framework="pt") as file:
        assert file.metadata() == {"tokens": str(LENGTHS[1])}
    names = set(load_file(tmp_path / block_file(0)))
    firsts = {group[0] for group in tower.inputs}
    assert names == {f"{first}.{part}" for first in firsts for part in ("second_moment", "abs_mean", "abs_max")}
    assert len(sites_in(model, tower)) == 3 * len(tower.linears)
