"""Rotations: Hadamard transforms, models that are rotated without a change, Cayley's descent."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints.checkpoint import merge
from lowrank_lab.checkpoints.description import Saved
from lowrank_lab.evaluation.macs import count_macs
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules import hadamard
from lowrank_lab.modules.factorized import factorize
from lowrank_lab.modules.steps import Hadamard
from lowrank_lab.quantization import learned_rotation, rotation, straight_through
from lowrank_lab.quantization.cayley import CayleySgd
from lowrank_lab.quantization.learned_rotation import attach, load
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context, pick_device
from tests.conftest import load_lively

pytestmark = pytest.mark.own_artifacts  # models are changed here under the keys of those that they were

# Widths of models, of heads, and of the fields they lead to: prime (107), squares (25, 49) and cubes (27, 343).
HADAMARD = [1, 2, 4, 12, 20, 28, 36, 44, 48, 52, 64, 80, 100, 192, 976, 500, 576, 1536]
OTHERS = [3, 5, 7, 137, 92, 6, 74, 274]


@pytest.mark.parametrize("width", HADAMARD)
def test_hadamard_matrices_have_orthogonal_rows_of_ones(width):
    matrix = hadamard.matrix(width)
    whole = (matrix * width**0.5).round().to(torch.int64)
    assert set(whole.unique().tolist()) <= {1, -1}
    torch.testing.assert_close(whole.double() / width**0.5, matrix, rtol=0, atol=1e-12)
    assert torch.equal(whole @ whole.T, width * torch.eye(width, dtype=torch.int64))


@pytest.mark.parametrize("width", [8960, 9728, 11008, 13824, 14336, 18944, 28672, 4864, 29568])
def test_widths_of_large_models_are_hadamards(width):
    """But for the piece of Paley, its order; the rest of the product are powers of two."""
    for size in hadamard.pieces(width):
        whole = (hadamard.matrix(size) * size**0.5).round()
        assert torch.equal(whole @ whole.T, size * torch.eye(size, dtype=torch.float64))
        assert (whole.abs() == 1).all()


@pytest.mark.parametrize("width", OTHERS)
def test_other_widths_are_orthogonal_and_spread(width):
    matrix = hadamard.matrix(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)
    assert matrix.abs().max() <= (2 / width) ** 0.5 + 1e-9


@pytest.mark.parametrize("width", [*HADAMARD, *OTHERS, 9 * 128])
def test_the_transform_is_a_product_with_the_matrix(width):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x), x @ hadamard.matrix(width))
    assert hadamard.transform(x.bfloat16()).dtype == torch.bfloat16


def test_random_signs_follow_the_seed():
    first, same, other = (hadamard.randomized(12, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.testing.assert_close(first @ first.T, torch.eye(12, dtype=torch.float64))


def context_of(lab, folder, *overrides, joint=False, untied=False):
    """A context whose model has large biases and norms that are not 1; with ``joint`` q, k and v are one site."""
    sites = ["grouping=qkv"] if joint else []
    [cell] = lab.cells(f"model.path={folder}", "method=dense", *sites, *overrides)
    context = Context(cell, Record(cell, None), pick_device("cpu"))
    context.model = load_lively(folder, 3.0, 0.3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in context.model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.2, 2.0, generator=generator)
    if untied:
        context.model.config.tie_word_embeddings = False
        context.model.lm_head.weight = torch.nn.Parameter(random(*context.model.lm_head.weight.shape, seed=1))
    return context


def factor(context, rank):
    """Put random factors of ``rank`` in the place of all sites."""
    for number, site in enumerate(context.sites.values()):
        block = blocks_of(context.model, context.tower)[site.block]
        left = random(site.out, rank, seed=2 * number) / rank**0.5
        factorize(block, site, left, random(rank, site.inp, seed=2 * number + 1) / site.inp**0.5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model):
    ids = torch.randint(3, 260, (2, 24), generator=torch.Generator().manual_seed(3))
    return model(ids, use_cache=False).logits


FAMILIES = ["llama", "llama untied", "mistral", "qwen2", "qwen3", "phi3"]
TRANSFORMS = [
    "quantization/transform=quarot",
    "quantization/transform=quarot quantization.transform.heads=false quantization.transform.down=false",
    "quantization/transform=spinquant quantization.transform.steps=2",
    "quantization/latent=hadamard",
]


# Every family with every transform, and each of both with every kind of sites.
SITES = ["dense", "factors", "joint factors"]
MIXED = [
    (family, transform, SITES[(first + second) % 3])
    for first, family in enumerate(FAMILIES)
    for second, transform in enumerate(TRANSFORMS)
]


@pytest.mark.parametrize(("family", "transform", "sites"), MIXED)
def test_a_rotation_changes_no_logits(lab, checkpoints, family, transform, sites):
    folder, joint = checkpoints[family.split()[0]], sites == "joint factors"
    context = context_of(
        lab, folder, "quantization=w4a4", *transform.split(), joint=joint, untied="untied" in family
    )
    if sites != "dense":
        factor(context, 9)
    before, weights = logits_of(context.model), {n: p.clone() for n, p in context.model.named_parameters()}
    quantization = context.cell.compressions["quantization"]
    with torch.no_grad():
        (quantization.transform or quantization.latent)(context, quantization)
    after = logits_of(context.model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert before.abs().max() > 1  # it is no model that gives next to nothing
    changed = [n for n, p in context.model.named_parameters() if n in weights and not torch.equal(p, weights[n])]
    assert changed or (sites == "dense" and quantization.latent is not None)
    tied = context.model.lm_head.weight is context.model.get_input_embeddings().weight
    assert tied == (family == "llama")


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("preset", ["quarot", "spinquant"])
def test_models_that_cannot_be_rotated_are_skipped(lab, checkpoints, family, preset):
    record = lab.run(f"model.path={checkpoints[family]}", "method=dense", f"quantization={preset}")
    assert record["status"] == "skipped"
    assert "rotates the residual stream" in record["reason"]


def outliers(model):
    """Make two channels of the residual stream stand out, as in a trained model."""
    model.get_input_embeddings().weight.data[:, [5, 17]] *= 30.0


@pytest.mark.parametrize(
    ("sites", "weights"),
    [
        pytest.param("dense", "rtn", marks=pytest.mark.slow),
        pytest.param("dense", "none", marks=pytest.mark.slow),
        pytest.param("factors", "none", marks=pytest.mark.slow),
        ("joint factors", "none"),
    ],
)
def test_rotations_lose_less_in_few_bits_where_channels_stand_out(lab, checkpoints, sites, weights):
    """In the mean over seeds: what one draw loses in so small a model differs by a fifth, also by the processor."""

    def error(preset: str, seed: int) -> float:
        overrides = [f"quantization={preset}", f"quantization/method={weights}", f"seed={seed}"]
        steps = ["quantization.transform.steps=2"] if preset == "spinquant" else []
        context = context_of(lab, checkpoints["mistral"], *overrides, *steps, joint=sites == "joint factors")
        if sites != "dense":
            factor(context, 24)
        outliers(context.model)
        exact = logits_of(context.model)
        context.cell.compressions["quantization"].apply(context, {})
        return float((logits_of(context.model) - exact).norm() / exact.norm())

    alone = error("w4a4", 0)
    for preset in ("quarot", "spinquant"):
        errors = [error(preset, seed) for seed in range(4)]
        assert max(errors) < alone
        assert sum(errors) / 4 < 0.85 * alone


def test_latent_hadamards_spread_the_latent_values(lab, checkpoints):
    context = context_of(lab, checkpoints["llama"], "quantization=w4a4", "quantization/latent=hadamard")
    factor(context, 24)
    block = blocks_of(context.model, context.tower)[0]
    factors = block.self_attn.q_proj
    sigma = torch.logspace(0, -2, 24)
    factors.right.weight.data, _ = torch.linalg.qr(factors.right.weight.data.T)
    factors.right.weight.data = sigma[:, None] * factors.right.weight.data.T
    context.cell.compressions["quantization"].latent(context, context.cell.compressions["quantization"])
    sizes = context.model.model.layers[0].self_attn.q_proj.right.weight.norm(dim=1)
    assert sizes.max() / sizes.min() < 3 < (sigma.max() / sigma.min())


@pytest.mark.parametrize(
    ("method", "preset"),
    [
        ("svdllm grouping=qkv", "quarot quantization/latent=hadamard"),
        ("dobi_untrained", "quarot quantization/latent=hadamard"),
        ("dense", "spinquant quantization.transform.steps=1"),
        ("svdllm", "spinquant quantization.transform.steps=1"),
    ],
)
def test_a_checkpoint_of_a_rotated_model_is_the_model_in_memory(lab, method, preset):
    name, *rest = method.split()
    made = lab.run(f"method={name}", *rest, "ratio=0.8", "save=true", *f"quantization={preset}".split())
    folder = lab.root / made["checkpoint"]
    loaded = lab.run(f"model.path={folder}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    for count in ("parameters", "bytes", "macs_per_token"):
        assert loaded["sizes"][count] == made["sizes"][count]
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    final = described["modules"]["model.norm"]  # the tiny llama's embedding is tied
    assert final == {"kind": "norm_with_steps", "steps": [{"step": "rotate", "width": 48, "size": 48}]}
    whole, bare = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        states = bare(ids).last_hidden_state
        torch.testing.assert_close(whole(ids).logits, whole.lm_head(states), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="dense weights cannot hold"):
        merge(whole, Saved.from_dict(described))


def test_learned_rotations_are_made_once_for_all_weight_formats(lab):
    rotations = []
    for bits in (4, 3):
        overrides = [
            "quantization=spinquant",
            "quantization.transform.steps=1",
            f"quantization.weights.bits={bits}",
        ]
        record = lab.run("method=dense", *overrides)
        rotations += [stage for stage in record["stages"] if stage["stage"] == "rotations"]
    first, second = rotations
    assert not first["reused"] and second["reused"]


@pytest.mark.parametrize("joint", [None, True])
@torch.no_grad()
def test_learning_sees_the_network_that_is_made(lab, checkpoints, joint):
    """With weights rounded in training too, it is the one that rotation and rounding to nearest then make.

    In float64, since in float32 a few numbers are rounded the other way.
    """
    logits = []
    for way in ("learning", "made"):
        overrides = ["quantization=spinquant", "quantization.weights.scale_dtype=float32"]
        context = context_of(lab, checkpoints["qwen2"], *overrides, joint=bool(joint))
        context.model.double()
        if joint:
            factor(context, 16)
        quantization = context.cell.compressions["quantization"]
        rotation.fold_norms(context.model, context.tower)
        rotation.hadamards(context.model, context.tower, False, True)
        r1, r2 = rotation.start(context.model, 0)
        if way == "learning":
            attach(context.model, context, quantization, True, r1, r2)
        else:
            rotation.rotate(context.model, context.tower, r1, r2)
            quantization.transform = None
            quantization.apply(context, {})
        logits.append(logits_of(context.model))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)


def test_without_rounding_the_loss_depends_on_no_rotation(lab, checkpoints, monkeypatch):
    """So its gradient is zero in all directions in which they stay orthogonal."""
    monkeypatch.setattr(straight_through, "rounded_values", lambda x, form: x)
    context = context_of(lab, checkpoints["qwen2"], "quantization=spinquant")
    context.model.double().requires_grad_(False)
    rotation.fold_norms(context.model, context.tower)
    rotations = [torch.nn.Parameter(r) for r in rotation.start(context.model, 0)]
    attach(context.model, context, context.cell.compressions["quantization"], True, *rotations)
    ids = context.calibration_ids
    context.model(ids, labels=ids).loss.backward()
    for r in rotations:
        turned = r.grad @ r.detach().mT
        assert (turned - turned.mT).norm() < 1e-6 * turned.norm()


def test_learning_lowers_the_loss_of_the_rounded_model(lab, checkpoints, monkeypatch):
    """Of one that has learned its text with two large channels; it begins without rotations here."""
    begin = torch.eye(48).double(), torch.eye(12).double().repeat(3, 1, 1)
    monkeypatch.setattr(learned_rotation, "start", lambda model, seed: begin)
    few = [
        "quantization.activations.bits=3",
        "quantization.transform.steps=20",
        "quantization.transform.batch_size=12",
    ]
    context = context_of(lab, checkpoints["mistral"], "quantization=spinquant", *few)
    context.model = load_lively(checkpoints["mistral"], 1.0, 0.0)
    outliers(context.model)
    ids, optimizer = (
        context.calibration_ids,
        torch.optim.Adam(context.model.requires_grad_(True).parameters(), lr=3e-3),
    )
    for _ in range(60):
        optimizer.zero_grad()
        context.model(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        context.cell.compressions["quantization"].transform(context, context.cell.compressions["quantization"])
    [file] = (lab.root / "artifacts" / "rotations").glob("*/facts.json")
    facts = json.loads(file.read_text())
    assert facts["loss_after"] < 0.95 * facts["loss_before"]
    r1, r2 = load(file.parent)
    for r in (r1, *r2):
        torch.testing.assert_close(r @ r.T, torch.eye(len(r)).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cayley_descends_and_stays_orthogonal(dtype):
    """The nearest rotation to a matrix (Procrustes) is found, from another one, for several at once."""
    goals = torch.linalg.matrix_exp(0.3 * (lambda a: a - a.mT)(random(2, 24, 24))).to(dtype)
    x = torch.nn.Parameter(torch.eye(24, dtype=dtype).repeat(2, 1, 1))
    optimizer = CayleySgd([x], lr=0.5)
    losses = []
    for _ in range(50):
        loss = (x - goals).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    identity = torch.eye(24, dtype=dtype).expand(2, 24, 24)
    torch.testing.assert_close(x @ x.mT, identity, rtol=0, atol=1e-5)


def test_a_cayley_step_is_that_of_the_paper():
    """Its fixed-point iteration, run until it stands still."""
    x, gradient = hadamard.matrix(12), random(12, 12).double()
    parameter = torch.nn.Parameter(x.clone())
    parameter.grad = gradient
    CayleySgd([parameter], lr=1e-3).step()
    moment = -gradient
    hat = moment @ x.T - x @ (x.T @ moment @ x.T) / 2
    skew, y = hat - hat.T, x + 1e-3 * moment
    for _ in range(20):
        y = x + 1e-3 / 2 * skew @ (x + y)
    torch.testing.assert_close(parameter.data, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 4, 12])
def test_the_step_over_heads_leaves_each_in_place(stride):
    x = random(3, 48).double()
    whole = torch.kron(hadamard.matrix(48 // stride), torch.eye(stride).double())
    torch.testing.assert_close(Hadamard(48, stride)(x), x @ whole)


def test_a_rotated_model_is_not_compared_layer_by_layer(lab):
    kept = lab.run("method=svdllm", "quantization=w4a4", "quantization/latent=hadamard", "eval=[ppl,output_error]")
    assert 0 < kept["metrics"]["output_error"]["value"] < 1
    record = lab.run("method=svdllm", "quantization=quarot", "eval=[ppl,output_error]")
    assert set(record["metrics"]) == {"ppl"}
    assert "changes the inputs of linears" in record["left_out"]["output_error"]


def test_what_is_done_online_is_counted(lab, checkpoints):
    """A full rotation after the last norm; in a block 4 heads, and 80 = 20 · 4 inputs of down_proj."""
    context = context_of(lab, checkpoints["llama"], "quantization=quarot")
    before = count_macs(context.model, torch.arange(3, 15)[None])
    context.cell.compressions["quantization"].apply(context, {})
    after = count_macs(context.model, torch.arange(3, 15)[None])
    assert before["steps"] == 0
    assert after == {**before, "steps": 48 * 48 + 3 * (48 * 4 + 80 * (20 + 4))}


@pytest.mark.parametrize("preset", ["quarot", "spinquant"])
def test_a_compressed_checkpoint_is_rotated_as_its_cell_is(lab, preset):
    steps = ["quantization.transform.steps=1"] if preset == "spinquant" else []
    overrides = [f"quantization={preset}", *steps]
    made = lab.run("method=svdllm", "ratio=0.6", "save=true")
    here = lab.run("method=svdllm", "ratio=0.6", *overrides)
    there = lab.run(f"model.path={lab.root / made['checkpoint']}", *overrides)
    assert there["metrics"]["ppl"]["value"] == here["metrics"]["ppl"]["value"]


def test_a_transform_first_used_for_inference_has_gradients_later():
    with torch.inference_mode():
        hadamard.transform(torch.ones(1, 84))
    x = random(1, 84).requires_grad_()
    hadamard.transform(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(1, 84) @ hadamard.matrix(84).T.float())
