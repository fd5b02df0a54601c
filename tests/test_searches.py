"""Allocations that run the model: sensitivities, gradients of singular values, learned ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_lab.lowrank.allocation import strs
from lowrank_lab.lowrank.allocation.differentiable import Differentiable, LearnedRank, train_ranks
from lowrank_lab.lowrank.allocation.sigma_gradient import load_sigma_gradients, make_sigma_gradients, score_tails
from lowrank_lab.lowrank.allocation.strs import candidate_ranks, measure
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.masked import mask_directions
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.ranks import budget, fit, total_cost
from lowrank_lab.lowrank.spectra import compress, load_spectrum, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models import tiny
from lowrank_lab.models.families import FAMILIES, Tower
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import site_weight
from lowrank_lab.modules.site import Site
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context
from tests.sites import sites_in

CPU = torch.device("cpu")


class Small:
    """A random model with spectra under the identity, its weights scaled up so that the loss depends on them.

    With ``certain`` its logits are, too, and the text is its own, so that truncation is worse than none.
    """

    def __init__(
        self, folder: Path, family: str = "llama", layers: int = 4, certain: bool = False, **sites: Any
    ) -> None:
        self.family, self.layers, self.spectra, self.certain = family, layers, folder, certain
        self.tower: Tower = FAMILIES[family].tower
        self.sites: dict[str, Site] = sites_in(self.model(), self.tower, **sites)
        self.ids = torch.randint(0, 260, (4, 24), generator=torch.Generator().manual_seed(1))
        if certain:
            self.ids = self._own_text()
        make_spectra(folder, self.model(), self.tower, self.sites, Identity(), None, None, CPU)

    @torch.no_grad()
    def _own_text(self) -> torch.Tensor:
        model, ids = self.model(), self.ids[:, :1]
        for _ in range(23):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return ids

    def model(self) -> nn.Module:
        settings = {**tiny.CONFIGS[self.family], "num_hidden_layers": self.layers}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.family, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
            if self.certain:
                model.get_output_embeddings().weight.mul_(10)
        return model

    def context(self, ratio: float = 0.5, model: nn.Module | None = None) -> Any:
        """As much of a context as an allocation needs that runs the model."""
        return SimpleNamespace(
            device=CPU,
            sites=self.sites,
            tower=self.tower,
            cached=lambda _name, _make: self.spectra,
            ratio=ratio,
            model=model,
            offload=None,
            take_model=self.model,
            task=CAUSAL_LM,
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("spectra"))


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("certain"), "mistral", certain=True)


def nll(model: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def truncated_alone(small: Small, name: str, rank: int) -> nn.Module:
    """The definition: the dense model with one site replaced."""
    model = small.model()
    ranks = {other: rank if other == name else None for other in small.sites}
    compress(model, small.tower, small.sites, ranks, small.spectra, Absorb(0.5), CPU)
    return model


RATIOS = [0.2, 0.5, 0.8]


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow), "gpt2", "opt"])
def test_fast_sensitivities_are_those_of_the_definition(tmp_path, family):
    spectra, found = tmp_path / "spectra", tmp_path / "found"
    spectra.mkdir()
    found.mkdir()
    here = Small(spectra, family, joint=["qkv"])
    dense = nll(here.model(), here.ids)
    batches = here.ids.split(3)  # of two sizes
    model = here.model()
    measure(found, here.context(model=model), batches, RATIOS)
    assert nll(model, here.ids) == dense, "the model is not as it was"
    differences = 0
    for block in range(len(blocks_of(model, here.tower))):
        for name, by_rank in json.loads((found / f"block_{block:03d}.json").read_text()).items():
            assert [int(rank) for rank in by_rank] == candidate_ranks(here.sites[name], RATIOS)
            for rank, fast in by_rank.items():
                plain = nll(truncated_alone(here, name, int(rank)), here.ids)
                assert math.exp(fast) == pytest.approx(math.exp(plain), rel=1e-4)
                differences += abs(plain - dense) > 1e-4
    assert differences > 20, "truncation changes nothing here, so the test would not see an error"


@pytest.mark.slow
def test_fast_sensitivities_need_at_most_55_percent_of_the_forward_work(tmp_path):
    spectra, found = tmp_path / "spectra", tmp_path / "found"
    spectra.mkdir()
    found.mkdir()
    here = Small(spectra, layers=30)
    here.sites = {name: site for name, site in here.sites.items() if name.endswith(("q_proj", "down_proj"))}
    ids = here.ids[:1]
    with FlopCounterMode(display=False) as fast:
        measure(found, here.context(model=here.model()), [ids], [0.5])
    plain = 0
    for name, site in here.sites.items():
        if site.block == 0:  # every block costs the same in a whole forward
            model = truncated_alone(here, name, candidate_ranks(site, [0.5])[0])
            with FlopCounterMode(display=False) as counter:
                nll(model, ids)
            plain += 30 * counter.get_total_flops()
    ratio = fast.get_total_flops() / plain
    assert 0.4 < ratio <= 0.55


def test_sensitivities_go_on_after_an_interruption(small, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    context = small.context(model=small.model())
    measure(whole, context, [small.ids], RATIOS)
    (cut / "block_000.json").write_text((whole / "block_000.json").read_text())
    (cut / "block_002.json").write_text((whole / "block_002.json").read_text())
    measured = []
    of_site = strs._of_site
    monkeypatch.setattr(strs, "_of_site", lambda *a: (measured.append(a[1].block), of_site(*a))[1])
    measure(cut, context, [small.ids], RATIOS)
    assert set(measured) == {1, 3}
    for block in range(4):
        file = f"block_{block:03d}.json"
        assert json.loads((cut / file).read_text()) == json.loads((whole / file).read_text())


def test_sigma_gradients_are_those_of_finite_differences(tmp_path):
    spectra, found = tmp_path / "spectra", tmp_path / "found"
    spectra.mkdir()
    found.mkdir()
    here = Small(spectra, layers=2, joint=["qkv"])
    make_sigma_gradients(found, here.context(), here.ids)
    sigma, mean_abs, mean_square = load_sigma_gradients(found, here.sites)
    for name in list(here.sites)[::2]:
        site = here.sites[name]
        for direction in (0, site.full // 2):
            slopes = []
            for sequence in here.ids.split(1):
                losses = []
                for step in (-1e-3, 1e-3):
                    model = here.model().double()
                    block = blocks_of(model, here.tower)[site.block]
                    weight = site_weight(block, site)
                    spectrum = load_spectrum(here.spectra, site, CPU)
                    left, right, s = spectrum.factors(weight, site.full)
                    change = torch.outer(left[:, direction], right[direction]) * (step / s[direction])
                    with torch.no_grad():
                        for member, part in zip(site.members, change.split(site.outs), strict=True):
                            block.get_submodule(member).weight.add_(part)
                    losses.append(nll(model, sequence))
                slopes.append((losses[1] - losses[0]) / 2e-3)
            expected = torch.tensor(slopes, dtype=torch.float64)
            scale = float(mean_abs[name].max())
            assert mean_abs[name][direction] == pytest.approx(
                float(expected.abs().mean()), rel=1e-2, abs=1e-3 * scale
            )
            assert mean_square[name][direction] == pytest.approx(
                float(expected.square().mean()), rel=2e-2, abs=1e-5 * scale**2
            )
    tails = score_tails(here.sites, sigma, mean_square)
    assert all(len(tail) == here.sites[name].full + 1 and tail[-1] == 0 for name, tail in tails.items())


SETTINGS: dict[str, Any] = {
    "forward": "pooled",
    "beta": 0.5,
    "gamma": 5.0,
    "steps": 12,
    "batch_size": 2,
    "learning_rate": 0.1,
    "seed": 0,
}


def test_what_is_trained_is_what_is_deployed(small):
    """A sharp mask at whole ranks gives the logits of the compressed model."""
    ranks = {name: 1 + site.last // 2 for name, site in small.sites.items()}
    learned = {name: LearnedRank(site, 0.5, 100.0, CPU) for name, site in small.sites.items()}
    for name, rank in learned.items():
        share = (ranks[name] - 1) / (rank.last - 1)
        rank.parameter.data.fill_(math.log(share / (1 - share)))
        assert rank.k.item() == pytest.approx(ranks[name], abs=1e-3)
    masked, deployed = small.model(), small.model()
    last = {name: site.last for name, site in small.sites.items()}
    masks = {name: rank.mask for name, rank in learned.items()}
    mask_directions(masked, small.tower, small.sites, small.spectra, last, masks, CPU)
    compress(deployed, small.tower, small.sites, ranks, small.spectra, Absorb(0.5), CPU)
    with torch.no_grad():
        torch.testing.assert_close(masked(small.ids).logits, deployed(small.ids).logits, rtol=1e-4, atol=1e-4)


def test_a_learned_rank_can_not_leave_its_range(small):
    site = next(iter(small.sites.values()))
    rank = LearnedRank(site, 0.5, 1.0, CPU)
    for value in (-1e4, 1e4):
        rank.parameter.data.fill_(value)
        assert 1 <= rank.k.item() <= site.last
        assert torch.isfinite(rank.mask(site.last)).all()


@pytest.mark.parametrize("forward", ["pooled", "per_batch"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_learned_ranks_lower_the_loss_at_the_same_budget(certain, tmp_path, ratio, forward):
    small = certain
    settings = Differentiable(**{**SETTINGS, "forward": forward})
    train_ranks(tmp_path, small.context(ratio), small.ids, settings)
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["sites"] == list(small.sites)
    assert len(history["steps"]) == 12
    assert all(len(step["k"]) == len(small.sites) for step in history["steps"])
    learned = json.loads((tmp_path / "ranks.json").read_text())
    assert all(1 <= learned[name] <= site.last for name, site in small.sites.items())
    limit = budget(small.sites, ratio)
    losses = {}
    start = {name: ratio * site.dense / site.cost(1) for name, site in small.sites.items()}
    for which, wanted in (("start", start), ("learned", learned)):
        model, ranks = small.model(), fit(small.sites, wanted, limit)
        compress(model, small.tower, small.sites, ranks, small.spectra, Absorb(0.5), CPU)
        losses[which] = nll(model, small.ids)
    assert losses["learned"] < losses["start"]
    assert not (tmp_path / "ranks.state").exists()


def test_rank_training_resumes_to_the_same_numbers(small, tmp_path, monkeypatch):
    from lowrank_lab.running import training

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    settings = Differentiable(**SETTINGS)
    train_ranks(whole, small.context(0.5), small.ids, settings)
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # after every step
    steps = []

    def stop(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) > 7:
            raise KeyboardInterrupt
        return rows(*arguments)

    rows = training._rows
    monkeypatch.setattr(training, "_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        train_ranks(cut, small.context(0.5), small.ids, settings)
    assert (cut / "ranks.state").exists()
    steps[:] = [0] * -100
    monkeypatch.setattr(training, "_rows", lambda *a: (steps.append(1), rows(*a))[1])
    steps.clear()
    train_ranks(cut, small.context(0.5), small.ids, settings)
    assert len(steps) == 12 - 7
    assert json.loads((cut / "ranks.json").read_text()) == json.loads((whole / "ranks.json").read_text())


def test_a_pooled_step_costs_at_most_two_training_steps(small):
    """Forward and backward work against that of training all weights on the same tokens, counted."""
    dense = small.model()
    with FlopCounterMode(display=False) as normal:
        logits = dense(small.ids).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), small.ids[:, 1:].flatten()).backward()
    learned = {name: LearnedRank(site, 0.5, 1.0, CPU) for name, site in small.sites.items()}
    pooled = small.model().requires_grad_(False)
    full = {name: site.full for name, site in small.sites.items()}  # the most that any storage can ask for
    masks = {name: rank.mask for name, rank in learned.items()}
    mask_directions(pooled, small.tower, small.sites, small.spectra, full, masks, CPU)
    with FlopCounterMode(display=False) as counter:
        logits = pooled(small.ids).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), small.ids[:, 1:].flatten()).backward()
    assert counter.get_total_flops() <= 2 * normal.get_total_flops()


def test_the_budget_of_learned_ranks_is_exact_after_rounding(lab):
    for storage in ("uv", "remap"):
        overrides = ["method=dobi_noremap", f"storage={storage}", "allocation.steps=3", "ratio=0.55"]
        record = lab.run(*overrides, "calibration.samples=4")
        [cell] = lab.cells(*overrides, "calibration.samples=4")
        from lowrank_lab.running.context import Context

        sites = Context(cell, SimpleNamespace(artifact=lambda _n, made: made), CPU).sites
        ranks = record["compressions"]["lowrank"]["plan"]
        left = budget(sites, 0.55) - total_cost(sites, ranks)
        assert 0 <= left < min(site.cost(1) for site in sites.values())
        assert record["sizes"]["ratio_reached"] <= 0.55


def test_a_performance_target_takes_all_that_the_perplexity_allows(lab, monkeypatch):
    """§A.4 where the perplexity is 200 less the percentage kept: the last plan of the order that keeps a half."""

    def kept(sites, ranks):
        return total_cost(sites, ranks) / sum(site.dense for site in sites.values())

    monkeypatch.setattr(strs, "perplexity_of", lambda context, ranks, _: 200 - 100 * kept(context.sites, ranks))
    words = ["method=asvd", "allocation=strs_perplexity", "allocation.ratios=[0.3,0.6]", "ratio=0.9"]
    skipped = lab.run(*words, "allocation.target_perplexity=99")
    assert "perplexity 100 on these samples, above allocation.target_perplexity=99" in skipped["reason"]
    record = lab.run(*words, "allocation.target_perplexity=150")
    assert "ratio=" not in record["label"]
    reached = record["sizes"]["ratio_reached"]
    found = record["compressions"]["lowrank"]["perplexity_of_samples"]
    assert found == pytest.approx({"dense": 100, "compressed": 200 - 100 * reached})
    [cell] = lab.cells(*words, "allocation.target_perplexity=150", "ratio=0.1")
    assert cell.key == record["key"]  # which has no ratio

    context = Context(cell, Record(cell, None), CPU)
    steps = answers_of(cell).allocation._steps(context)
    shares = [kept(context.sites, strs.plan(context.sites, steps, index)) for index in range(len(steps))]
    assert shares[-1] < 0.5
    assert reached == pytest.approx(min(share for share in shares if share >= 0.5))
