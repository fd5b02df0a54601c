"""Models of images and text: their rows, their batches, and what is computed on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.gradients import load_gradients, make_gradients
from lowrank_lab.calibration.statistics import load_statistics, make_statistics
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.spectra import compress, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models import tiny
from lowrank_lab.models.tasks.image_text import IMAGE_TEXT as TASK
from lowrank_lab.models.tasks.image_text import IMAGES_OF_TEXT, joined, sample_of
from lowrank_lab.models.vision_families import IMAGE_TEXT_FAMILIES, row_of
from lowrank_lab.models.walk import blocks_of, in_parts
from tests.sites import sites_in

CPU = torch.device("cpu")
SIZES = [[(40, 30)], [], [(30, 40), (56, 20)]]  # of the images of three samples: one, none, two
ANSWERS = [[70, 71], [72], [73, 74, 75]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in IMAGE_TEXT_FAMILIES}
    for family, folder in found.items():
        tiny.build(family, folder)
    return found


# SmolVLM's classes are copies of Idefics3's.
@pytest.fixture(params=["llava", "llava_next", "idefics3", pytest.param("smolvlm", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, folders: dict[str, Path]) -> Any:
    return TASK.load(str(folders[family]), None, "float32", False)


@pytest.fixture
def samples(family: str) -> list[Any]:
    """Three samples of different lengths, with one, no and two images."""
    processor, found = tiny.processor(family), []
    for number, (sizes, answer) in enumerate(zip(SIZES, ANSWERS, strict=True)):
        images = [Image.effect_noise(size, 80).convert("RGB") for size in sizes]
        text = "<image>" * len(images) + "what is this? " * (number + 1)
        found.append(sample_of(processor(text=text, images=images or None, return_tensors="pt"), answer))
    return found


def logits_alone(model: Any, samples: list[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [TASK.logits(model, sample)[0] for sample in samples]


def test_the_rows_name_every_linear_of_a_block(model, family):
    row = row_of(model.config)
    assert row.towers.keys() == {"language", "vision"} and next(iter(row.towers)) == "language"
    for tower in row.towers.values():
        for block in blocks_of(model, tower):
            assert {n for n, m in block.named_modules() if type(m).__name__ == "Linear"} == set(tower.linears)
        assert "Norm" in type(model.get_submodule(tower.folding.final_norm)).__name__
        for norm in tower.folding.norms:
            assert norm is None or "Norm" in type(block.get_submodule(norm)).__name__


def test_padding_and_other_samples_change_no_logits(model, samples):
    """Each sample gives the same alone and in a batch, cut out of it too."""
    batch, alone = joined(samples), logits_alone(model, samples)
    with torch.no_grad():
        together = TASK.logits(model, batch)
        parts = [TASK.logits(model, part) for part in in_parts(batch, 2)]
    for number, logits in enumerate(alone):
        torch.testing.assert_close(together[number, : len(logits)], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts[number // 2][number % 2, : len(logits)], logits, atol=1e-4, rtol=1e-4)


def test_the_model_sees_the_image(model, samples):
    other = {**samples[0], "pixel_values": samples[0]["pixel_values"].flip(-1)}
    first, second = logits_alone(model, [samples[0], other])
    assert (first - second).abs().max() > 1e-4


def test_the_loss_is_of_answers_alone(model, samples):
    batch, alone = joined(samples), logits_alone(model, samples)
    expected = [
        -torch.log_softmax(logits[-len(answer) - 1 : -1], -1)[range(len(answer)), answer]
        for logits, answer in zip(alone, ANSWERS, strict=True)
    ]
    with torch.no_grad():
        torch.testing.assert_close(TASK.loss(model, batch, "sum"), torch.cat(expected).sum(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(TASK.loss(model, batch), torch.cat(expected).mean(), rtol=1e-4, atol=1e-4)
        of_tokens = TASK.loss(model, batch, "none")
        logits, classes = TASK.predictions(model, batch)
    assert classes.tolist() == [token for answer in ANSWERS for token in answer]
    found = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert TASK.predicted(batch) == sum(map(len, ANSWERS)) == int((of_tokens != 0).sum())


def test_statistics_are_those_of_a_plain_loop(model, samples, tmp_path):
    """Of all tokens, also those of images, but of no padding, in whatever batches."""
    tower, inputs = row_of(model.config).tower, {}
    hooks = [
        block.get_submodule(group[0]).register_forward_pre_hook(
            lambda _m, args, place=(index, group): inputs.setdefault(place, []).append(args[0].detach()[0])
        )
        for index, block in enumerate(blocks_of(model, tower))
        for group in tower.inputs
    ]
    logits_alone(model, samples)
    for hook in hooks:
        hook.remove()
    make_statistics(tmp_path, model, tower, in_parts(joined(samples), 2), CPU, task=TASK)
    for (index, group), seen in inputs.items():
        rows = torch.cat(seen).double()
        found = load_statistics(tmp_path, index, group, CPU)
        assert found.tokens == len(rows) == sum(sample["input_ids"].numel() for sample in samples)
        torch.testing.assert_close(found.second_moment, rows.T @ rows / len(rows), atol=1e-5, rtol=1e-3)
    gradients = tmp_path / "gradients"
    gradients.mkdir()
    make_gradients(gradients, model, tower, in_parts(joined(samples), 1), CPU, weight=True, task=TASK)
    last = blocks_of(model, tower)[-1].get_submodule("mlp.down_proj")
    expected = torch.zeros_like(last.weight)
    for sample in samples:
        model.zero_grad()
        TASK.loss(model, sample, "sum").backward()
        expected += last.weight.grad.square() / len(samples)
    found_rows = load_gradients(gradients, len(blocks_of(model, tower)) - 1, "mlp.down_proj", CPU).row_fisher
    torch.testing.assert_close(found_rows.float(), expected.sum(1), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("name", ["language", "vision"])
def test_full_rank_reproduces_the_dense_logits(model, samples, name, tmp_path):
    tower, batch = row_of(model.config).of_tower(name).tower, joined(samples)
    with torch.no_grad():
        dense = TASK.logits(model, batch)
        sites = sites_in(model, tower)
        make_spectra(tmp_path, model, tower, sites, Identity(), None, None, CPU)
        compress(model, tower, sites, {n: site.full for n, site in sites.items()}, tmp_path, Absorb(0.5), CPU)
        assert any(type(module).__name__ == "FactorizedLinear" for module in model.modules())
        torch.testing.assert_close(TASK.logits(model, batch), dense, atol=1e-4, rtol=0)


def test_statistics_of_the_encoder_are_of_all_positions_of_images(model, samples, tmp_path):
    """Of all tiles that an image is cut into; what fills up a batch is none. A batch needs an image."""
    tower, seen = row_of(model.config).of_tower("vision").tower, []
    name, batch = tower.inputs[0][0], joined([samples[0], samples[2]])
    linear = blocks_of(model, tower)[0].get_submodule(name)
    hook = linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().flatten(0, 1)))
    logits_alone(model, [samples[0], samples[2]])
    hook.remove()
    make_statistics(tmp_path, model, tower, in_parts(batch, 1), CPU, task=IMAGES_OF_TEXT)
    rows, found = torch.cat(seen).double(), load_statistics(tmp_path, 0, tower.inputs[0], CPU)
    assert found.tokens == len(rows)
    assert found.tokens == IMAGES_OF_TEXT.positions(lambda: TASK.skeleton(model.config, False), tower.blocks, batch)
    torch.testing.assert_close(found.second_moment, rows.T @ rows / len(rows), atol=1e-5, rtol=1e-3)
    with pytest.raises(UserError, match="a batch of the calibration has no image"):
        make_statistics(tmp_path, model, tower, [samples[1]], CPU, task=IMAGES_OF_TEXT)
