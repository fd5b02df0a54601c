"""Fine-tuning with the dense model as teacher: its losses, and that all it trains comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from lowrank_lab.basics.errors import UserError
from lowrank_lab.lowrank import factors
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.refinement import distill
from lowrank_lab.models import tiny
from lowrank_lab.models.tasks import distillation
from lowrank_lab.models.tasks.named import TASKS
from lowrank_lab.models.vision_families import task_of
from lowrank_lab.running import runner

from .conftest import Lab
from .images import vision_words
from .refined import CPU, check_resumed, context_of, refined

SHORT = (
    "refinement=distill",
    "refinement.samples=8",
    "refinement.seqlen=16",
    "refinement.batch_size=4",
    "refinement.epochs=3",
    "refinement.warmup=0",
    "refinement.learning_rate=0.003",
)
TEXT = ("method=svdllm", "calibration.samples=3", *SHORT)
HEADS = ("method=comcat", *SHORT)
BATCHES = {
    "opt": {
        "input_ids": torch.arange(4, 24).view(2, 10),
        "attention_mask": torch.tensor([[1] * 10, [0] * 3 + [1] * 7]),
    },
    "vit": {
        "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([1, 0, 7]),
    },
}


def loaded(family: str, folder: Path) -> tuple[Any, nn.Module]:
    tiny.build(family, folder)
    task = TASKS[task_of(family)]
    return task, task.load(str(folder), None, "float32", False)


def test_the_losses_by_hand():
    """Of two classes with logits (0, ln 3) and (0, 0): the teacher has ¼ and ¾, the student a half each."""
    teacher, student = torch.tensor([[0.0, 3.0]]).log().clamp(min=0), torch.zeros(1, 2)
    entropy = torch.tensor([0.25, 0.75]) @ torch.tensor([0.5, 1.5]).log()
    torch.testing.assert_close(distillation.soft(student, teacher, 1.0), entropy)
    torch.testing.assert_close(distillation.soft(student, 2 * teacher, 2.0), 4 * entropy)
    torch.testing.assert_close(distillation.soft(student.repeat(3, 1), teacher.repeat(3, 1), 1.0), entropy)
    torch.testing.assert_close(distillation.hard(teacher, torch.tensor([[2.0, 1.0]])), torch.tensor(4.0).log())


def test_the_gradient_of_a_soft_loss_is_of_one_size_at_every_temperature():
    """τ (p_student − p_teacher), at high temperatures the distance of the centred logits by the classes."""
    student = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.3, 0.5, 0.1]], dtype=torch.float64)
    for tau in (1.0, 3.0, 1e4):
        (gradient,) = torch.autograd.grad(distillation.soft(student, teacher, tau), student)
        expected = tau * ((student / tau).softmax(-1) - (teacher / tau).softmax(-1))
        torch.testing.assert_close(gradient, expected.detach())
    centred = (student - student.mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(gradient, centred.detach() / 3, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", BATCHES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(family, tmp_path):
    task, model = loaded(family, tmp_path)
    batch = BATCHES[family]
    with_labels = distillation.loss(task, model, model, batch, alpha=0.0, tau=2.0)
    torch.testing.assert_close(with_labels, task.loss(model, batch))
    loss = distillation.loss(task, model, model, batch, alpha=1.0, tau=2.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    gradients = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    assert gradients and max(gradients) < 1e-5
    hard = distillation.loss(task, model, model, batch, alpha=1.0, tau=None)
    logits, _ = task.predictions(model, batch)
    torch.testing.assert_close(hard, -logits.log_softmax(-1).max(-1).values.mean())


@pytest.mark.parametrize("tau", ["null", "2"], ids=["hard", "soft"])
@pytest.mark.parametrize("words", [TEXT, HEADS], ids=["text", "images"])
def test_training_lowers_the_loss(lab, tmp_path, words, tau):
    words = (*words, *vision_words("vit", tmp_path)) if words is HEADS else words
    refined(lab, tmp_path / "out", *words, f"refinement.tau={tau}", "ratio=0.6")
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["steps"] == 3 * 2
    assert facts["last_epoch_loss"] < facts["first_epoch_loss"]
    assert not list((tmp_path / "out").glob("*.state"))


CASES = {
    "heads, some dense": (*HEADS, "allocation=global_tail", "metric=second_moment", "model.path=tiny:dinov2"),
    "heads and matrices": (*HEADS, "targets=all", "refinement.trains=compressed", "model.path=tiny:vit"),
    "heads of text": (*TEXT, "method=comcat", "model.path=tiny:opt"),
    "transposed, tied": (*TEXT, "model.path=tiny:gpt2"),
    "joint": (*TEXT, "grouping=qkv", "refinement.trains=compressed"),
    "dense attention": (*TEXT, "targets=mlp", "model.path=tiny:opt", "dtype=bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_installed_is_what_was_trained(lab, tmp_path, monkeypatch, name):
    """The logits of the student at the end of its training are those of the model that a cell gets."""
    images = vision_words("vit", tmp_path) if "comcat" in str(CASES[name]) and "opt" not in str(CASES[name]) else []
    students: list[nn.Module] = []
    train = distill.train

    def watched(student: nn.Module, *rest: Any) -> dict[str, Any]:
        students.append(student)
        return train(student, *rest)

    monkeypatch.setattr(distill, "train", watched)
    folder = tmp_path / "out"
    context, ranks = refined(lab, folder, *images, *CASES[name], "ratio=0.7")
    [student] = students
    if name == "heads, some dense":
        assert None in ranks.values()
    model, batch = context.model, {n: tensor[:2] for n, tensor in context.text("refinement").items()}
    dense = {n: parameter.clone() for n, parameter in model.named_parameters()}
    storage = answers_of(context.cell).storage
    factors.install_factors(model, context.tower, context.sites, ranks, folder, storage, CPU)
    with torch.no_grad():
        expected, found = (context.task.predictions(one.float(), batch)[0] for one in (student, model))
    near = 2e-2 if "dtype=bfloat16" in CASES[name] else 1e-5
    torch.testing.assert_close(found, expected, atol=near * expected.abs().max().item(), rtol=0)
    trained = load_file(folder / factors.PARAMETERS)
    assert trained.keys() <= dense.keys()
    members = {f"{context.tower.blocks}.{s.block}.{member}" for s in context.sites.values() for member in s.members}
    others = {n for n in trained if n.rpartition(".")[0] not in members}
    assert bool(others) == ("refinement.trains=compressed" not in CASES[name])


@pytest.mark.parametrize("words", [TEXT, HEADS], ids=["text", "images"])
def test_an_interrupted_fine_tuning_ends_as_an_undisturbed_one(lab, data_root, tmp_path, monkeypatch, words):
    words = (*words, *vision_words("vit", tmp_path)) if words is HEADS else words
    refined(Lab(tmp_path / "undisturbed", data_root), tmp_path / "whole", *words)
    made = check_resumed(monkeypatch, lab, tmp_path / "whole", tmp_path / "resumed", words, stop_at=3)
    assert made == [*range(6)]


def test_a_fine_tuned_checkpoint_loads_to_the_same_logits(lab, tmp_path):
    images = vision_words("deit", tmp_path)
    words = [*images, *HEADS, "targets=all", "ratio=0.6", "save=true"]
    [cell] = lab.cells(*words)
    record = runner.run(cell)
    assert record["status"] == "done", record
    assert record["sizes"]["ratio_reached"] <= 0.6
    assert record["compressions"]["lowrank"]["refinement"]["steps"] == 6
    again = lab.run(*images, f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["metrics"] == record["metrics"]
    model = AutoModelForImageClassification.from_pretrained(lab.root / record["checkpoint"]).eval()
    dense = context_of(lab, *words).model
    name = "deit.layernorm.weight"
    assert not torch.equal(model.get_parameter(name), dense.get_parameter(name))


def test_other_refinements_leave_products_alone(lab):
    record = lab.run("model.path=tiny:opt", "method=comcat", "refinement=lora")
    assert record["status"] == "skipped"
    assert "use refinement=distill or none" in record["reason"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refinement.alpha=2", "refinement: alpha=2 is not valid"),
        ("refinement.tau=0", "refinement: tau=0 is not valid"),
        ("refinement.trains=norms", "refinement: trains=norms is not valid"),
        ("refinement.weight_decay=-1", "refinement: weight_decay=-1 is not valid"),
        ("refinement.epochs=0", "refinement: epochs=0 is not valid"),
    ],
)
def test_a_mistake_is_one_line(lab, override, message):
    with pytest.raises(UserError) as error:
        lab.cells(*TEXT, override)
    assert message in str(error.value)
