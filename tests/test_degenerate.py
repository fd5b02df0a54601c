"""Legal but degenerate models under every method: zero weights, singular statistics, dead channels, huge scales.

Each cell ends in a number from finite weights, in which a zero weight is still zero; in a reason why it was
skipped; or in one line that names the linear.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.lowrank.refinement.weighted_descent import descend
from lowrank_lab.lowrank.solver import decompose, decompose_by_cholesky
from lowrank_lab.models import tiny
from lowrank_lab.modules import positive
from lowrank_lab.modules.base import dense_weight
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.gptq import gptq
from lowrank_lab.running import pipeline

from .conftest import Lab

Edit = Callable[[dict[str, Tensor]], None]
BLOCK = "model.layers.1."
Q, K, V, OUT = (f"{BLOCK}self_attn.{name}_proj.weight" for name in "qkvo")
UP, GATE, DOWN = (f"{BLOCK}mlp.{name}_proj.weight" for name in ("up", "gate", "down"))
SOME = (Q, OUT, UP, DOWN)
NORMS = (f"{BLOCK}input_layernorm.weight", f"{BLOCK}post_attention_layernorm.weight")


def zero(*names: str) -> Edit:
    return lambda tensors: [tensors[name].zero_() for name in names]


def times(factor: float, *names: str) -> Edit:
    return lambda tensors: [tensors[name].mul_(factor) for name in names]


def each(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: [tensors[name].copy_(change(tensors[name].clone())) for name in SOME]


def orthogonal(weight: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    return u @ vt


def one_large(weight: Tensor) -> Tensor:
    weight[3, 5] = 1e8
    return weight


EDITS: dict[str, Edit] = {
    "o_zero": zero(OUT),  # no gradient comes to q, k and v
    "up_zero": zero(UP),  # a tall one
    "qkv_zero": zero(Q, K, V),
    "mlp_zero": zero(UP, GATE, DOWN),
    "all_zero": lambda tensors: zero(*(name for name in tensors if "_proj" in name))(tensors),
    "zero_rows": each(lambda weight: weight * (torch.arange(len(weight)) > 8).unsqueeze(1)),
    "zero_columns": each(lambda weight: weight * (torch.arange(weight.shape[1]) > 8)),
    "rank_1": each(lambda weight: torch.outer(weight[:, 0], weight[0])),
    "equal_rows": each(lambda weight: weight[:1].expand_as(weight)),
    "equal_singular_values": each(orthogonal),
    "one_large": each(one_large),
    "huge": times(1e18, UP),
    "tiny": times(1e-25, *SOME),
    "denormal": times(1e-40, *SOME),
    "no_inputs": zero(*NORMS),  # what the linears read is zero
    "dead_inputs": lambda tensors: [tensors[name][:8].zero_() for name in NORMS],
    "no_embeddings": zero("model.embed_tokens.weight"),
}
SMALL = ("eval.ppl.max_windows=1", "calibration.samples=4", "calibration.seqlen=16")
FEW = (*SMALL[:1], "calibration.samples=1", "calibration.seqlen=4")  # fewer tokens than channels
LORA = "svdllm_lora refinement.samples=4 refinement.epochs=1 refinement.batch_size=4 refinement.seqlen=16"
METHODS = [
    "svd",
    "svdllm",
    "svdllm metric.cholesky=true",
    "svdllm grouping=inputs",
    "svdllm storage=u",
    "svdllm storage=v",
    "svdllm_u",
    "svdllm_v2",
    LORA,
    "asvd_uniform",
    "asvd_uniform metric=abs_max metric.alpha=1",
    "asvd allocation.ratios=[0.3,0.6,0.9]",
    "asvd_kv allocation.ratios=[0.3,0.6,0.9]",
    "svd_strs allocation.ratios=[0.3,0.6,0.9]",
    "fwsvd",
    "fwsvd_strs allocation.ratios=[0.3,0.6,0.9]",
    "wsvd",
    "wsvd grouping=inputs",
    "kron",
    "kron metric.output=full",
    "qsvd",
    "qsvd allocation.form=global",
    "dobi allocation.steps=2",
    "dobi_noremap allocation.steps=2 allocation.forward=per_batch",
    "dobi_ipca allocation=uniform",
    "dobi_untrained",
    "svdllm pruning=magnitude",
    *(f"dense quantization={one}" for one in ("gptq", "awq", "kmeans", "nf4", "smoothquant", "quarot", "duquant")),
    "dense quantization=adaquant quantization.method.steps=2",
    "dense quantization=spinquant quantization.transform.steps=1",
    *(f"svdllm quantization={one}" for one in ("gptq", "awq", "kmeans", "smoothquant", "qsvd_w8a8")),
]
QUICK = [
    ("o_zero", "wsvd"),
    ("up_zero", "svdllm metric.cholesky=true"),
    ("no_inputs", "wsvd"),
    ("tiny", "wsvd"),
    ("all_zero", "qsvd"),
]


@pytest.fixture(scope="module")
def degenerate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, by the name of its edit."""
    regular = tmp_path_factory.mktemp("models") / "regular"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **{**tiny.CONFIGS["llama"], **sizes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(regular)
    tiny.byte_tokenizer().save_pretrained(regular)

    def make(edit: str) -> Path:
        folder = regular.parent / edit
        if not folder.exists():
            folder.mkdir()
            for file in regular.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            tensors = load_file(regular / "model.safetensors")
            for name, tensor in tensors.items():
                if "_proj" in name:
                    tensor.mul_(8)  # so that linears matter
            EDITS[edit](tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def check_weights(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """All tensors of ``model`` are finite, and what is zero in ``dense`` is zero in it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    for name, tensor in dense.items():
        if "_proj" in name and not tensor.any():
            left = dense_weight(model.get_submodule(name.removesuffix(".weight"))).abs().max()
            assert left < 1e-15, name  # a joint site has rounding of its other linears


def check_outcome(lab: Lab, folder: Path, method: str, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Run the cell, check what it did to the weights, and how it ended."""
    dense = load_file(folder / "model.safetensors")
    evaluate = pipeline._evaluate

    def check(context: Any) -> None:
        if "lora" not in method:  # a zero weight may be trained
            check_weights(context.model, dense)
        evaluate(context)

    monkeypatch.setattr(pipeline, "_evaluate", check)
    said = ""
    try:
        record = lab.run(f"method={method.split()[0]}", *method.split()[1:], f"model.path={folder}", *settings)
        json.dumps(record, allow_nan=False)
        assert record["status"] == "done" or record["reason"]
    except (UserError, FloatingPointError) as error:
        said = str(error)
    assert not said or ("\n" not in said and ("_proj" in said or "layers." in said))


@pytest.mark.parametrize(("edit", "method"), QUICK)
def test_degenerate_models_end_in_a_number_or_in_one_line(edit, method, degenerate, lab, monkeypatch):
    check_outcome(lab, degenerate(edit), method, monkeypatch, "ratio=0.6", *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_every_degenerate_model_under_every_method(edit, degenerate, lab, monkeypatch):
    for method in METHODS:
        with monkeypatch.context() as patch:
            ratio = [] if method.startswith("dense") else ["ratio=0.6"]
            check_outcome(lab, degenerate(edit), method, patch, *ratio, *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("ratio=0.6", *FEW), ("ratio=0.12", *SMALL), ("ratio=0.999", *SMALL)])
def test_extreme_settings_under_every_method(settings, degenerate, lab, monkeypatch):
    for method in METHODS:
        with monkeypatch.context() as patch:
            chosen = settings[1:] if method.startswith("dense") else settings
            check_outcome(lab, degenerate("o_zero"), method, patch, *chosen)


def gram(size: int, samples: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(size, samples, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return (x @ x.T).double()


def weight(out: int, inp: int) -> Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_inverse_factor_of_a_singular_matrix_is_that_of_its_regular_part():
    regular = gram(6, 30)
    torch.testing.assert_close(
        positive.inverse_cholesky(regular).T @ positive.inverse_cholesky(regular), torch.linalg.inv(regular)
    )
    singular = torch.zeros(9, 9, dtype=torch.float64)
    singular[:6, :6] = regular
    upper = positive.inverse_cholesky(singular)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    torch.testing.assert_close((upper.T @ upper)[:6, :6], torch.linalg.inv(regular))
    assert positive.inverse_cholesky(torch.zeros(3, 3, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_a_singular_system_has_its_least_solution(rank):
    matrix, right = gram(6, rank) if rank else torch.zeros(6, 6, dtype=torch.float64), weight(6, 2)
    expected = torch.linalg.pinv(matrix, hermitian=True) @ right
    torch.testing.assert_close(positive.solve_positive(matrix, right), expected)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_whitening_with_few_tokens_has_the_least_error(shape):
    out, inp = shape
    w, c = weight(out, inp), gram(inp, 3)
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    best = torch.linalg.svdvals(w @ root).square()
    for solve in (decompose, decompose_by_cholesky):
        for rank in (1, 2, 3):
            left, right, _ = solve(w, c, *([None] if solve is decompose else [])).factors(w, rank)
            error = ((w - left @ right) @ root).square().sum()
            torch.testing.assert_close(error, best[rank:].sum(), rtol=1e-5, atol=1e-8)


def test_an_output_metric_that_rounding_made_indefinite_is_used():
    """g gᵀ of fewer gradients than outputs, summed in float32, has eigenvalues a little below zero."""
    w, r = weight(40, 24), gram(40, 10, torch.float32)
    assert torch.linalg.eigvalsh(r)[0] < 0
    best = torch.linalg.svdvals(torch.linalg.cholesky(r + 1e-4 * torch.eye(40)).T @ w).square()
    left, right, _ = decompose(w, None, r).factors(w, 10)
    error = w - left @ right
    assert (error * (r @ error)).sum() < 1e-3 * best.sum()


def test_the_cholesky_route_leaves_a_zero_weight_zero():
    for shape in ((12, 8), (8, 12)):
        w = torch.zeros(shape, dtype=torch.float64)
        left, right, _ = decompose_by_cholesky(w, gram(shape[1], 3)).factors(w, 4)
        assert left.isfinite().all() and not (left @ right).any()


def test_the_descent_from_an_empty_factor_stays_there():
    w, ones = torch.zeros(6, 5), torch.ones(6, 5)
    left, right = descend(w, ones, torch.eye(6, 3), torch.zeros(3, 5), steps=2)
    assert not (left @ right).any()


def test_gptq_with_hardly_any_damping_is_at_least_as_good_as_rounding():
    w, c = weight(8, 12), gram(12, 3)
    form = Format(4, "integer", False, "channel", "float32")
    found = gptq(w, c, form, damping=1e-18).dequantize().double() - w
    nearest = gptq(w, torch.zeros_like(c), form).dequantize().double() - w
    assert (found @ c * found).sum() < (nearest @ c * nearest).sum()
