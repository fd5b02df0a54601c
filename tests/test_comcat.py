"""COMCAT: products within heads, exact and reported as measured on tensors, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from lowrank_lab.calibration.statistics import load_mean, load_statistics, make_means, make_statistics
from lowrank_lab.cells.targets import Heads, Targets, sites_of
from lowrank_lab.lowrank.head_spectra import of_head, with_one
from lowrank_lab.lowrank.masked import first, mask_directions
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.metric.second_moment import SecondMoment
from lowrank_lab.lowrank.spectra import compress, load_tails, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models import tiny
from lowrank_lab.models.families import heads_of
from lowrank_lab.models.tasks.named import TASKS
from lowrank_lab.models.vision_families import ROWS, VISION_FAMILIES
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.heads import HeadRows, product_of
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.site import HeadSite
from lowrank_lab.reporting.paper_figures import PAPER_FIGURES
from lowrank_lab.running import runner
from tests.images import vision_words

CPU = torch.device("cpu")
FAMILIES = [*VISION_FAMILIES, "opt"]
METRICS = {"identity": Identity(), "second_moment": SecondMoment(cholesky=False)}


class Prepared:
    """A tiny model with biases that matter, statistics of its inputs, and its sites by head."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = ROWS[family], folder
        self.tower, self.task = self.family.tower, TASKS[self.family.task]
        (folder / "model").mkdir()
        tiny.build(family, folder / "model")
        generator = torch.Generator().manual_seed(0)
        if family == "opt":
            self.batch = {"input_ids": torch.randint(4, 260, (6, 20), generator=generator)}
        else:
            self.batch = {"pixel_values": torch.randn(8, 3, 28, 28, generator=generator)}
        self.statistics, self.means = folder / "statistics", folder / "means"
        model = self.model()
        for made, make in ((self.statistics, make_statistics), (self.means, make_means)):
            made.mkdir()
            make(made, model, self.tower, [self.batch], CPU, task=self.task)
        self.sites: dict[str, Any] = sites_of(
            self.tower,
            linear_shapes(model, self.tower),
            Heads(),
            Targets("attention", "parameters"),
            Absorb(0.5),
            heads_of(self.family, model.config),
        )

    def model(self) -> Any:
        model = self.task.load(str(self.folder / "model"), None, "float32", False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for block in blocks_of(model, self.tower):
                for name in self.tower.linears:
                    linear = block.get_submodule(name)
                    linear.weight.mul_(5)
                    linear.bias.copy_(torch.randn(linear.bias.shape, generator=generator))
        return model

    def compressed(self, metric: str, ranks: dict[str, int | None]) -> tuple[Any, float]:
        model, folder = self.model(), self.folder / metric
        if not folder.exists():
            folder.mkdir()
            inputs = (self.statistics, None, CPU, self.means) if metric != "identity" else (None, None, CPU)
            make_spectra(folder, model, self.tower, self.sites, METRICS[metric], *inputs)
        return model, compress(model, self.tower, self.sites, ranks, folder, Absorb(0.5), CPU)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(**self.batch).logits


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("metric", METRICS)
def test_full_rank_reproduces_the_dense_logits(prepared, metric):
    dense = prepared.logits(prepared.model())
    model, _ = prepared.compressed(metric, {name: site.full for name, site in prepared.sites.items()})
    replaced = [module for module in model.modules() if isinstance(module, HeadRows)]
    assert len(replaced) == 3 * len(blocks_of(model, prepared.tower))
    torch.testing.assert_close(prepared.logits(model), dense, atol=1e-5 * dense.abs().max().item(), rtol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_reported_error_is_that_of_the_products(prepared, metric):
    """‖R^½ (M − M') C^½‖² on the (C + 1)² matrices of queries and keys; of values and outputs R = I.

    Where C is that of the data, it is for these that of what the output linear is given.
    """
    ranks = {name: 1 + number % site.last for number, (name, site) in enumerate(prepared.sites.items())}
    model, reported = prepared.compressed(metric, ranks)
    tails = load_tails(prepared.folder / metric, prepared.sites)
    measured = 0.0
    dense, group = blocks_of(prepared.model(), prepared.tower), prepared.tower.inputs[0]
    for name, site in prepared.sites.items():
        p, q = product_of(dense[site.block], site)
        compressed = of_compressed(blocks_of(model, prepared.tower)[site.block], site)
        error = p @ q - compressed
        c = torch.eye(site.width + 1, dtype=torch.float64)
        if metric == "second_moment":
            inputs = load_statistics(prepared.statistics, site.block, group, CPU)
            c = with_one(inputs, load_mean(prepared.means, site.block, group, CPU)).second_moment
        if metric == "second_moment" and site.product == "vo":
            between = torch.linalg.pinv(p) @ compressed @ torch.linalg.pinv(q)
            error = p @ (torch.eye(site.inp) - between)
            attended = load_statistics(prepared.statistics, site.block, prepared.tower.inputs[1], CPU)
            c = of_head(attended, site).second_moment
        r = c if site.product == "qk" else torch.eye(site.width, dtype=torch.float64)
        squared = (r @ error @ c @ error.T).trace().item()
        assert tails[name][ranks[name]] == pytest.approx(squared, rel=1e-3, abs=1e-6 * tails[name][0])
        measured += squared
    assert reported == pytest.approx(measured, rel=1e-3)


def of_compressed(block: Any, site: HeadSite) -> torch.Tensor:
    """The product of a site in a compressed block, from the linears that stand for dense ones."""
    rows = slice(site.head * site.inp, (site.head + 1) * site.inp)
    first, second = (block.get_submodule(member) for member in site.members)
    q = torch.cat([second.dense_weight()[rows], second.dense_bias()[rows, None]], 1).double()
    if site.product == "vo":
        return first.dense_weight()[:, rows].double() @ q
    return torch.cat([first.dense_weight()[rows], first.dense_bias()[rows, None]], 1).double().T @ q


def test_the_best_product_is_no_product_of_the_best_matrices(tmp_path):
    """At the same parameters the product loses less than the two matrices apart: what COMCAT is about."""
    prepared = Prepared("vit", tmp_path)
    model, width = prepared.model(), 48
    block = blocks_of(model, prepared.tower)[0]
    site = next(site for site in prepared.sites.values() if site.product == "qk")
    p, q = product_of(block, site)
    rank = 6
    make_spectra(tmp_path, model, prepared.tower, {"site": site}, Identity(), None, None, CPU)
    together = load_tails(tmp_path, {"site": site})["site"][rank]
    small = rank * 2 * width // (2 * (width + site.inp))  # of each (size, width) matrix with as many values in all
    cut = lambda matrix: (lambda u, s, v: (u[:, :small] * s[:small]) @ v[:small])(
        *torch.linalg.svd(matrix, full_matrices=False)
    )
    apart = (p @ q - cut(p) @ cut(q)).square().sum().item()
    assert together < apart


@pytest.mark.parametrize("family", ["dinov2", "opt"])
def test_a_checkpoint_loads_to_the_same_logits(lab, family, tmp_path):
    """Also as dense weights, with ranks that differ between heads."""
    words = ["model.path=tiny:opt"] if family == "opt" else vision_words(family, tmp_path)
    [cell] = lab.cells(
        *words,
        "method=comcat",
        "metric=second_moment",
        "allocation=global_tail",
        "save.merge=true",
        "save.checkpoint=true",
        "ratio=0.6",
    )
    record = runner.run(cell)
    ranks = record["compressions"]["lowrank"]["plan"]
    assert len(set(ranks.values())) > 1
    auto = AutoModelForCausalLM if family == "opt" else AutoModelForImageClassification
    loaded, merged = (
        auto.from_pretrained(lab.root / record[what]).eval() for what in ("checkpoint", "merged_checkpoint")
    )
    inputs = (
        {"input_ids": torch.arange(4, 24)[None]} if family == "opt" else {"pixel_values": torch.randn(2, 3, 28, 28)}
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert count(loaded).macs == record["sizes"]["macs_per_token"] < count(merged).macs
    again = lab.run(*words, f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["metrics"] == record["metrics"]


@pytest.mark.parametrize("allocation", ["differentiable", "sigma_gradient"])
def test_ranks_from_gradients_differ_between_heads(lab, tmp_path, allocation):
    """The loss has a gradient for how much of each direction of a head is kept."""
    words = ["method=comcat", f"allocation={allocation}", "ratio=0.6"]
    words += ["allocation.steps=4", "allocation.learning_rate=0.5"] if allocation == "differentiable" else []
    record = lab.run(*vision_words("dinov2", tmp_path), *words)
    ranks = record["compressions"]["lowrank"]["plan"]
    assert len(set(ranks.values())) > 1
    assert record["sizes"]["ratio_reached"] == pytest.approx(0.6, abs=0.02)


def test_masks_of_whole_ranks_are_truncations(prepared):
    """Of every head at once: what a training of ranks sees is what it will get."""
    ranks = {name: 1 + number % site.last for number, (name, site) in enumerate(prepared.sites.items())}
    cut, _ = prepared.compressed("identity", ranks)
    full = {name: site.full for name, site in prepared.sites.items()}
    masked, masks = prepared.model(), {name: first(rank) for name, rank in ranks.items()}
    mask_directions(masked, prepared.tower, prepared.sites, prepared.folder / "identity", full, masks, CPU)
    expected = prepared.logits(cut)
    torch.testing.assert_close(prepared.logits(masked), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_rotary_models_are_skipped_with_the_reason(lab):
    record = lab.run("method=comcat")
    assert record["status"] == "skipped"
    assert "rotary embedding" in record["reason"]


def test_singular_values_by_head_and_by_matrix(lab, tmp_path):
    """Of a product from two small factors, the same as of the whole product; and the plot has all curves."""
    record = lab.run(*vision_words("vit", tmp_path), "method=dense", "eval=[head_values,ppl]")
    measured = record["metrics"]["head_values"]
    prepared = Prepared("vit", tmp_path)
    blocks = blocks_of(prepared.task.load(str(prepared.folder / "model"), None, "float32", False), prepared.tower)
    whole = [torch.linalg.svdvals(block.attention.q_proj.weight.detach().double()) for block in blocks]
    expected = torch.stack([values / values[0] for values in whole]).mean(0)
    torch.testing.assert_close(
        torch.tensor(measured["curves"]["W_q"]["values"]).double(), expected, atol=1e-4, rtol=0
    )
    found = []
    for site in prepared.sites.values():
        if site.product == "vo":
            p, q = product_of(blocks[site.block], site)
            values = torch.linalg.svdvals(p @ q[:, : site.width])[: site.inp]
            found.append(values / values[0])
    of_heads = torch.tensor(measured["curves"]["W_o W_v"]["values"]).double()
    torch.testing.assert_close(of_heads, torch.stack(found).mean(0), atol=1e-4, rtol=0)
    data = PAPER_FIGURES["slides/singular_values"].data([record])
    assert set(data["matrix"]) == set(measured["curves"]) and set(data["level"]) == {"head", "matrix"}
