"""Refinements: what they report is what they did, and an interruption changes nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config
from lowrank_lab.lowrank import factors
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.factors import load_factors
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.refinement import lora, weighted_descent
from lowrank_lab.lowrank.refinement.lora import Lora
from lowrank_lab.lowrank.spectra import compress
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import factors_of, site_weight
from lowrank_lab.running.context import Context

from .conftest import Lab, stopped_at_block_one
from .refined import CPU, check_resumed, context_of, refined

LORA = (
    "method=svdllm_lora",
    "calibration.samples=3",
    "refinement.samples=8",
    "refinement.seqlen=16",
    "refinement.batch_size=4",
    "refinement.warmup=0",
    "refinement.learning_rate=0.003",
)

WSVD = ("method=wsvd", "calibration.samples=3")


def compressed(context: Context, ranks: dict[str, int | None]) -> Any:
    """The model at the start of a refinement, in float32."""
    made = spectra(context)
    model = context.take_model()
    compress(model, context.tower, context.sites, ranks, made, Absorb(0.5), CPU)
    return model


def all_factors(context: Context, model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    blocks = blocks_of(model, context.tower)
    found = {name: factors_of(blocks[site.block], site) for name, site in context.sites.items()}
    return {name: (left.clone(), right.clone()) for name, (left, right) in found.items()}


OTHER = (*WSVD, "refinement.steps=2")  # which asks for a gradient of every weight


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, LORA)
        if family in ("llama", "opt", "gpt2", "gemma3_text")
        else pytest.param(family, LORA, marks=pytest.mark.slow)
        for family in sorted(FAMILIES)
    ]
    + [("opt", OTHER), *(pytest.param(family, OTHER, marks=pytest.mark.slow) for family in ("llama", "gpt2"))],
)
@pytest.mark.own_artifacts
def test_every_family_runs_end_to_end(lab, method, family):
    joint = ("grouping=qkv",) if "qkv" in family or family == "llama" else ()
    short = ("refinement.epochs=1",) if method is LORA else ()
    record = lab.run(*method, *short, *joint, f"model.path=tiny:{family}", "ratio=0.5")
    assert record["status"] == "done"
    assert record["sizes"]["ratio_reached"] <= 0.5
    assert record["compressions"]["lowrank"]["squared_error"] is None
    assert record["metrics"]["ppl"]["value"] > 1
    [folder] = (lab.root / "artifacts" / "factors").glob("[!.]*")
    kept = {"artifact.json", "facts.json", *(f.name for f in folder.glob("block_*.safetensors"))}
    assert {f.name for f in folder.iterdir()} == kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_lowers_the_loss_and_keeps_the_ranks(lab, tmp_path, dtype):
    context, ranks = refined(lab, tmp_path / "out", *LORA, "grouping=qkv", f"dtype={dtype}")
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["left"]["steps"] == facts["right"]["steps"] == 3 * 2
    assert facts["left"]["last_epoch_loss"] < facts["left"]["first_epoch_loss"]
    assert facts["right"]["last_epoch_loss"] < facts["right"]["first_epoch_loss"]
    for name, site in context.sites.items():
        left, right = load_factors(tmp_path / "out", site)
        assert left.shape == (site.out, ranks[name])
        assert right.shape == (ranks[name], site.inp)
    assert not list((tmp_path / "out").glob("*.state"))


@pytest.mark.parametrize("grouping", ["each", "qkv"])
def test_a_phase_changes_its_side_alone(lab, tmp_path, grouping):
    context = context_of(lab, *LORA, f"grouping={grouping}")
    ranks = answers_of(context.cell).allocation(context)
    model = compressed(context, ranks)
    before = all_factors(context, model)
    names = {name for name, _ in model.named_modules()}
    others = {n: p.clone() for n, p in model.named_parameters() if ".left" not in n and ".right" not in n}
    for side, changed in (("left", 0), ("right", 1)):
        lora.train_side(
            model,
            side,
            context.text("refinement")["input_ids"],
            tmp_path,
            answers_of(context.cell).refinement,
            CAUSAL_LM,
        )
        after = all_factors(context, model)
        for name in before:
            assert not torch.equal(before[name][changed], after[name][changed])
            assert torch.equal(before[name][1 - changed], after[name][1 - changed])
        before = after
    assert {name for name, _ in model.named_modules()} == names  # nothing of peft is left
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in others.items())


def test_merged_is_what_was_trained(lab):
    context = context_of(lab, *LORA, "refinement.dropout=0", "grouping=qkv")
    model = compressed(context, answers_of(context.cell).allocation(context))
    layers = lora.attach(model, lora.linears_of(model, "right"), answers_of(context.cell).refinement)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    ids = context.text("refinement")["input_ids"][:2]
    with torch.no_grad():
        trained = model(ids).logits
        lora.merge(model, layers)
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """The outcome of a fine-tuning that nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    refined(Lab(root / "results", data_root), root / "whole", *LORA)
    return root / "whole"


@pytest.mark.parametrize("stop_at", [3, 8], ids=["left", "right"])
def test_an_interrupted_fine_tuning_ends_as_an_undisturbed_one(lab, whole, tmp_path, monkeypatch, stop_at):
    """With dropout; 6 steps a phase, of which none is made twice."""
    made = check_resumed(monkeypatch, lab, whole, tmp_path / "resumed", LORA, stop_at)
    assert made == [*range(6), *range(6)]


def test_the_training_text_is_part_of_what_was_made(lab, data_root):
    base, other, same = (
        LowRankKeys(lab.cells(*LORA, *more)[0]).factors
        for more in ((), ("refinement.samples=9",), ("refinement/dataset=wikitext2", "calibration.batch_size=2"))
    )
    assert base != other
    assert base == same
    assert LowRankKeys(lab.cells(*LORA, "refinement.seed=1")[0]).factors != base


def test_instructions_can_be_trained_on(lab, data_root, tmp_path):
    with pytest.raises(UserError, match=r"no file .*alpaca-cleaned/train\.jsonl"):
        lab.cells(*LORA, "refinement/dataset=alpaca")
    root = tmp_path / "data"
    (root / "yahma" / "alpaca-cleaned").mkdir(parents=True)
    (root / "wikitext").symlink_to(data_root / "wikitext")
    rows = [{"instruction": "Add.", "input": text, "output": "Three."} for text in ("1 and 2", "")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "yahma" / "alpaca-cleaned" / "train.jsonl").write_text(lines)
    options = (*LORA, "refinement/dataset=alpaca", f"data_root={root}")
    [cell] = lab.cells(*options)
    with_input, without = config.build(cell.cfg.refinement.dataset.corpus).documents("train", str(root))
    assert with_input.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\nThree.")
    assert without.endswith("### Instruction:\nAdd.\n\n### Response:\nThree.")
    record = lab.run(*options, "refinement.epochs=1")
    assert record["compressions"]["lowrank"]["refinement"]["left"]["steps"] == 2
    with pytest.raises(UserError, match=r"dataset=alpaca is not valid; this data set has no eval part"):
        lab.cells("dataset=alpaca", f"data_root={root}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refinement.r=0", "refinement: r=0 is not valid"),
        ("refinement.learning_rate=-1", "refinement: learning_rate=-1 is not valid"),
        ("refinement.dropout=1", "refinement: dropout=1 is not valid"),
        ("refinement.seqlen=1", "refinement.seqlen=1 is not valid"),
        ("refinement/dataset=ptb", "ptb_text_only/penn_treebank/train.jsonl"),
        ("refinement/dataset=no", "refinement/dataset=no: no such option; choose one of alpaca, c4"),
        ("method=wsvd refinement.floor=0", "refinement: floor=0 is not valid"),
        ("method=wsvd refinement.steps=0.5", "refinement: steps=0.5 is not valid"),
    ],
)
def test_a_mistake_is_one_line(lab, override, message):
    with pytest.raises(UserError) as error:
        lab.cells("method=svdllm_lora", *override.split())
    assert message in str(error.value)


def test_too_long_training_windows_are_skipped(lab):
    record = lab.run(*LORA, "refinement.seqlen=4096")
    assert record["status"] == "skipped"
    assert "refinement.seqlen=4096 is longer than the 2048 positions" in record["reason"]


def test_lora_needs_no_calibration_of_its_own():
    assert not Lora.needs_calibration


@pytest.mark.parametrize("grouping", ["each", "qkv"])
def test_the_weighted_error_is_the_measured_one_and_falls(lab, tmp_path, grouping):
    after: dict[float, dict[str, float]] = {}
    for ratio in (0.3, 0.6):
        folder = tmp_path / str(ratio)
        options = (*WSVD, f"grouping={grouping}", f"ratio={ratio}")
        context, _ = refined(lab, folder, *options)
        facts = json.loads((folder / "facts.json").read_text())["weighted_error"]
        assert facts.keys() == context.sites.keys()
        blocks = blocks_of(context.model, context.tower)
        for name, site in context.sites.items():
            fisher = load_file(context.weight_fisher / f"block_{site.block:03d}.safetensors")
            a2 = torch.cat([fisher[f"{member}.weight"] for member in site.members]).double()
            a2 = a2 / a2.mean() + answers_of(context.cell).refinement.floor
            weight = site_weight(blocks[site.block], site).double()
            left, right = (factor.double() for factor in load_factors(folder, site))
            measured = (a2 * (weight - left @ right) ** 2).sum() / (a2 * weight**2).sum()
            assert facts[name]["after"] == pytest.approx(float(measured), rel=1e-4)
            assert facts[name]["after"] < facts[name]["before"]
        after[ratio] = {name: fact["after"] for name, fact in facts.items()}
    assert all(after[0.6][name] < after[0.3][name] for name in after[0.3])


def test_weighted_descent_goes_on_where_it_was_stopped(lab, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    refined(lab, whole, *WSVD)
    with stopped_at_block_one(monkeypatch, factors):
        refined(lab, stopped, *WSVD)
    first = (stopped / "block_000.safetensors").stat().st_mtime_ns
    refined(lab, stopped, *WSVD)
    assert (stopped / "block_000.safetensors").stat().st_mtime_ns == first
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in stopped.iterdir()}


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (40, 30) and an importance over four orders of magnitude, part of it zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    importance = torch.exp(3 * torch.randn(40, 30, generator=generator, dtype=torch.float64))
    importance[:, 3] = importance[5] = 0
    return weight, importance / importance.mean() + 0.01


def truncated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]


def test_under_a_constant_importance_the_plain_svd_is_where_it_stays(problem):
    weight, _ = problem
    start = truncated(weight, 7)
    found = weighted_descent.descend(weight, torch.full_like(weight, 3.0), *start, 20)
    torch.testing.assert_close(found[0] @ found[1], start[0] @ start[1], rtol=1e-4, atol=1e-4)


def test_under_a_separable_importance_the_closed_form_is_reached(problem):
    weight, importance = problem
    rows, columns = importance.mean(1), importance.mean(0)
    scaled = rows.sqrt().unsqueeze(1) * weight * columns.sqrt()
    best = torch.linalg.svdvals(scaled)[7:].square().sum() / scaled.square().sum()
    separable = torch.outer(rows, columns)
    found = weighted_descent.descend(weight, separable, *truncated(weight, 7), 100)
    assert weighted_descent.weighted_error(weight, separable, *found) == pytest.approx(float(best), rel=1e-2)


def test_every_step_lowers_the_weighted_error(problem):
    weight, importance = problem
    factors = truncated(weight, 7)
    errors = [weighted_descent.weighted_error(weight, importance, *factors)]
    for _ in range(15):
        factors = weighted_descent.descend(weight, importance, *factors, 1)
        errors.append(weighted_descent.weighted_error(weight, importance, *factors))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]
