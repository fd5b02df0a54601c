"""Output and storage errors against the solver's exact errors and against their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_lab.calibration.statistics import load_statistics, make_statistics
from lowrank_lab.cells import grid
from lowrank_lab.cells.cell import Cell
from lowrank_lab.evaluation.output_error import OutputError, RelativeError, output_errors, storage_errors
from lowrank_lab.evaluation.robust import NotFiniteError
from lowrank_lab.lowrank.metric.second_moment import SecondMoment
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.lowrank.spectra import compress, load_spectrum, load_tails, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.remap import Remap
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import dense_weight, site_weight
from lowrank_lab.reporting import figures, tables
from lowrank_lab.reporting.sections import OUTPUT_ERROR
from lowrank_lab.running import runner
from tests.sites import sites_in

from .conftest import REPOSITORY, load_lively

CPU = torch.device("cpu")
CASES = [("llama", ()), ("llama", ("qkv", "gate_up")), ("gpt2", ()), ("opt", ()), ("gemma2", ())]


class Setting:
    """A tiny model with biases that are not zero, and its spectra under the second moment of ``batches``."""

    def __init__(self, checkpoint: Path, folder: Path, family: str, joint: tuple[str, ...]) -> None:
        self.checkpoint, self.tower = checkpoint, FAMILIES[family].tower
        self.statistics, self.spectra = folder / "statistics", folder / "spectra"
        self.statistics.mkdir()
        self.spectra.mkdir()
        ids = torch.randint(4, 260, (5, 24), generator=torch.Generator().manual_seed(1))
        self.batches = ids.split(2)  # of two sizes
        self.dense = self.load()
        self.sites = sites_in(self.dense, self.tower, joint)
        make_statistics(self.statistics, self.dense, self.tower, self.batches, CPU)
        metric = SecondMoment(cholesky=False)
        make_spectra(self.spectra, self.dense, self.tower, self.sites, metric, self.statistics, None, CPU)

    def load(self) -> Any:
        return load_lively(self.checkpoint, weights=3, bias=0.05)

    def ranks(self, fraction: float) -> Ranks:
        return {name: max(1, round(fraction * site.full)) for name, site in self.sites.items()}

    def compressed(self, ranks: Ranks, storage: Any = None) -> Any:
        model = self.load()
        compress(model, self.tower, self.sites, ranks, self.spectra, storage or Absorb(0.5), CPU)
        return model

    def errors(self, ranks: Ranks) -> dict[str, Any]:
        return output_errors(self.dense, self.compressed(ranks), self.tower, self.batches, CPU)

    def storage(self, ranks: Ranks, storage: Any) -> dict[str, dict[str, float]]:
        """What the evaluator says of a cell with these ranks and this storage."""
        context: Any = SimpleNamespace(
            cell=SimpleNamespace(
                compressions={"lowrank": SimpleNamespace(answers=SimpleNamespace(refinement=None))}
            ),
            cached=lambda _name, _make: self.spectra,
            record=SimpleNamespace(data={"compressions": {"lowrank": {"plan": ranks}}}),
            model=self.compressed(ranks, storage),
            **{name: getattr(self, name) for name in ("tower", "sites")},
            device=CPU,
        )
        return storage_errors(context, self.dense)


@pytest.fixture(scope="module", params=CASES, ids=str)
def setting(request: Any, checkpoints: dict[str, Path], tmp_path_factory: Any) -> Setting:
    family, joint = request.param
    return Setting(checkpoints[family], tmp_path_factory.mktemp("setting"), family, joint)


def test_errors_of_linears_on_the_calibration_text_are_the_solvers_tails(setting):
    """Σ over a site's members of ‖(W − W') X‖² / tokens = Σ λ beyond the rank, with ‖W X‖² / tokens = tr W C Wᵀ."""
    ranks, tails = setting.ranks(0.4), load_tails(setting.spectra, setting.sites)
    linears = setting.errors(ranks)["linears"]
    for name, site in setting.sites.items():
        group = next(group for group in setting.tower.inputs if site.members[0] in group)
        c = load_statistics(setting.statistics, site.block, group, CPU).second_moment
        squared = 0.0
        for member in site.members:
            block = blocks_of(setting.dense, setting.tower)[site.block]
            w = dense_weight(block.get_submodule(member)).detach().double()
            squared += linears[member][site.block] ** 2 * (w @ c * w).sum().item()
        assert squared == pytest.approx(tails[name][ranks[name]], rel=1e-4)


def test_full_rank_has_no_error(setting):
    found = setting.errors(setting.ranks(1.0))
    errors = [error for of in (*found["linears"].values(), *found["blocks"].values()) for error in of]
    assert max(errors) < 2e-5
    assert len(errors) == (len(setting.tower.linears) + 4) * len(blocks_of(setting.dense, setting.tower))


def test_errors_fall_with_rank(setting):
    low, middle, high = (setting.errors(setting.ranks(fraction)) for fraction in (0.2, 0.5, 0.8))
    for name in setting.tower.linears:
        for a, b, c in zip(*(found["linears"][name] for found in (low, middle, high)), strict=True):
            assert a > b > c > 0
    for kind in ("own", "own_of_tokens"):
        assert sum(low["blocks"][kind]) > sum(middle["blocks"][kind]) > sum(high["blocks"][kind])


def test_own_and_accumulated_errors_are_those_of_whole_models(setting):
    """Accumulated: the outputs of the blocks in two forwards. Own: the same, with that block alone compressed."""
    ranks = setting.ranks(0.4)

    def outputs(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        for block in blocks_of(model, setting.tower):
            block.register_forward_hook(lambda _m, _i, output: seen.append(output.double()))
        with torch.no_grad():
            model(torch.cat(setting.batches), use_cache=False)
        return seen

    exact = outputs(setting.load())
    relative = lambda y, y2: ((y - y2).norm() / y.norm()).item()
    of_tokens = lambda y, y2: ((y - y2).norm(dim=-1) / y.norm(dim=-1)).mean().item()
    blocks = setting.errors(ranks)["blocks"]
    whole = outputs(setting.compressed(ranks))
    for index, y in enumerate(exact):
        alone: Ranks = {name: ranks[name] if s.block == index else None for name, s in setting.sites.items()}
        here = outputs(setting.compressed(alone))[index]
        assert blocks["own"][index] == pytest.approx(relative(y, here), rel=1e-4)
        assert blocks["own_of_tokens"][index] == pytest.approx(of_tokens(y, here), rel=1e-4)
        assert blocks["accumulated"][index] == pytest.approx(relative(y, whole[index]), rel=1e-4)
        assert blocks["accumulated_of_tokens"][index] == pytest.approx(of_tokens(y, whole[index]), rel=1e-4)


def test_a_block_that_stays_dense_has_no_error_of_its_own(setting):
    ranks: Ranks = {name: 3 if site.block == 1 else None for name, site in setting.sites.items()}
    found = setting.errors(ranks)
    own, accumulated = found["blocks"]["own"], found["blocks"]["accumulated"]
    assert [error > 0 for error in own] == [index == 1 for index in range(len(own))]
    assert [error > 0 for error in accumulated] == [index >= 1 for index in range(len(own))]
    assert accumulated[1] == own[1]
    for errors in found["linears"].values():
        assert [error is not None for error in errors] == [index == 1 for index in range(len(own))]


def test_the_storage_error_of_factors_in_full_precision_is_rounding(setting):
    for error in setting.storage(setting.ranks(0.5), Absorb(0.5)).values():
        assert error["mse"] < 1e-13 and error["mae"] < 1e-6


def test_the_storage_error_of_remapping_is_that_of_its_definition(setting):
    """Algorithm 3 by hand: of U Σ and V the first min(out, in) rows in 8 bits a direction, the rest in float16."""

    def stored(values: torch.Tensor, full: int) -> torch.Tensor:
        step = values[:full].abs().amax(0) / 127
        return torch.cat([(values[:full] / step).round() * step.float().double(), values[full:].half().double()])

    ranks = setting.ranks(0.5)
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in setting.tower.linears}
    for name, site in setting.sites.items():
        weight = site_weight(blocks_of(setting.dense, setting.tower)[site.block], site).double()
        left, right, _ = load_spectrum(setting.spectra, site, CPU).factors(weight, ranks[name])
        u, sigma, v = (part[..., : ranks[name]] for part in torch.svd(left @ right))
        difference = stored(u * sigma, site.full) @ stored(v, site.full).T - left @ right
        for member, rows in zip(site.members, difference.split(site.outs), strict=True):
            expected[member].append(rows)
    found = setting.storage(ranks, Remap())
    assert set(found) == set(setting.tower.linears)
    for member, error in found.items():
        mse = sum(rows.square().mean().item() for rows in expected[member]) / len(expected[member])
        mae = sum(rows.abs().mean().item() for rows in expected[member]) / len(expected[member])
        assert error["mse"] == pytest.approx(mse, rel=1e-3) and error["mse"] > 1e-9
        assert error["mae"] == pytest.approx(mae, rel=1e-3)


def test_an_error_is_relative_to_the_output_without_the_bias():
    """Two tokens, the first a hundred times as large: it decides the norm, and is half of the mean."""
    error, bias = RelativeError(), torch.tensor([1.0, 1.0])
    exact = torch.tensor([[300.0, 400.0], [3.0, 4.0]])
    error.add(exact + bias, exact + bias + torch.tensor([[30.0, 40.0], [3.0, 4.0]]), bias)
    assert error.of_all("x") == pytest.approx(math.sqrt((50**2 + 5**2) / (500**2 + 5**2)))
    assert error.of_each_token() == pytest.approx((0.1 + 1.0) / 2)
    nothing = RelativeError()
    nothing.add(torch.zeros(2, 3), torch.zeros(2, 3))
    assert nothing.of_all("x") == nothing.of_each_token() == 0.0


def test_an_output_that_is_not_finite_names_its_layer(setting):
    ranks = setting.ranks(0.5)
    model, name = setting.compressed(ranks), setting.tower.linears[-1]
    blocks_of(model, setting.tower)[1].get_submodule(name).left.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError) as raised:
        output_errors(setting.dense, model, setting.tower, setting.batches, CPU)
    assert raised.value.layer == f"{setting.tower.blocks}.1.{name}"


SMALL = ("eval.output_error.seqlen=32", "eval.output_error.max_windows=3", "eval.output_error.batch_size=2")


def test_a_grid_with_the_dense_model_keeps_its_other_metrics(lab):
    asked = ("eval=[ppl,output_error]", *SMALL)
    dense = lab.run("method=dense", *asked)
    assert dense["status"] == "done" and list(dense["metrics"]) == ["ppl"]
    assert lab.cells("method=dense", *asked)[0].key == lab.cells("method=dense")[0].key
    uniform, refined, remapped = (
        lab.run(f"method={method}", "ratio=0.6", *asked) for method in ("svdllm", "svdllm_u", "dobi_untrained")
    )
    measured = {r["method"]: r["metrics"]["output_error"] for r in (uniform, refined, remapped)}
    for record in measured.values():
        assert 0 < record["value"] == record["blocks"]["accumulated"][-1] < 1
        assert record["protocol"]["windows"] == 3
    for exact in ("svdllm", "svdllm_u"):
        assert all(error["mse"] < 1e-13 for error in measured[exact]["storage"].values())
    assert all(error["mse"] > 1e-9 for error in measured["dobi_untrained"]["storage"].values())

    records = [dense, uniform, refined, remapped]
    [(caption, group)] = list(tables.groups(records, OUTPUT_ERROR))
    assert "the first 3 of" in caption and set(group["method"]) == set(measured)
    table = tables.presentable(group, OUTPUT_ERROR)
    assert {"last block", "by token", "q", "down", "stored MSE"} <= set(table.columns)
    figure = figures.output_error_against_block(group, caption)
    assert [len(axes.get_lines()) for axes in figure.axes] == [3] * 4
    assert figure.axes[1].get_lines()[0].get_ydata()[-1] == group["value"].iloc[0]
    assert "storage_mse_mlp.up_proj" in tables.csv(records, OUTPUT_ERROR).splitlines()[0]


def test_what_pruning_adds_to_the_factors_counts_as_stored(lab):
    asked = ("method=svdllm", "ratio=0.6", "eval=[ppl,output_error]", *SMALL)
    pruned = lab.run(*asked, "pruning=magnitude", "sparsity=0.5")["metrics"]["output_error"]
    assert all(error["mse"] > 1e-9 for error in pruned["storage"].values())


def test_a_cell_with_nothing_to_measure_is_skipped_and_says_so(lab):
    def only(*overrides: str) -> Cell:
        base = [o for o in lab.overrides() if not o.startswith("eval.")]
        return grid.plan(REPOSITORY / "conf", "config", [*base, "eval=output_error", *SMALL, *overrides], False)[0]

    record = runner.run(only("method=dense"))
    assert record["status"] == "skipped"
    assert record["reason"] == "eval=output_error measures nothing on the dense model of texts"
    saved = lab.run("method=svd", "save=true")["checkpoint"]
    record = runner.run(only(f"model.path={lab.root / saved}"))
    assert "whose dense original is not known" in record["reason"]


@pytest.mark.parametrize(
    "change", [{"seqlen": 1}, {"max_windows": 0}, {"bos": "no"}, {"batch_size": 0}], ids=lambda c: next(iter(c))
)
def test_values_out_of_range_are_rejected(change):
    good = {"seqlen": 16, "max_windows": None, "bos": "text", "batch_size": 1}
    OutputError(**good)
    with pytest.raises(ValueError, match=next(iter(change))):
        OutputError(**{**good, **change})
