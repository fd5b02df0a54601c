"""Low rank as a compression: what a cell does with the answers of a method."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lowrank_lab.basics.checks import is_count
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.basics.paths import RUN
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.compression import Compression, Plan
from lowrank_lab.cells.settings import lowrank_settings
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.answers import Answers
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from lowrank_lab.lowrank import factors, spectra
    from lowrank_lab.running.context import Context
else:
    factors = LazyModule("lowrank_lab.lowrank.factors")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")


def low_rank(allocation: Any, **answers: Any) -> LowRank | None:
    """The compression that conf/config.yaml names; None without an allocation: then nothing is factored."""
    return None if allocation is None else LowRank(allocation=allocation, **answers)


OF_ANSWERS = {  # what an answer of each kind has
    "metric": "needs_inputs",
    "grouping": "joint",
    "targets": "ratio_of",
    "allocation": "needs_calibration",
    "refinement": "needs_calibration",
    "storage": "cost",
}


class LowRank(Compression):
    """Put two thin factors in the place of every site."""

    axis = "lowrank"
    components = ("STATISTICS", "GRADIENTS", "SPECTRA", "COMPRESSION")
    makes_factors = True
    on_checkpoints = False

    def __init__(self, **answers: Any) -> None:
        self.answers = Answers(**answers)
        self.site_rules = (self.answers.grouping, self.answers.targets, self.answers.storage)

    @property
    def needs_calibration(self) -> bool:
        return self.answers.needs_calibration

    def settings(self, cfg: dict[str, Any]) -> dict[str, Any]:
        return lowrank_settings(cfg)

    def check_settings(self, cfg: DictConfig) -> None:
        for name, attribute in OF_ANSWERS.items():
            if (answer := getattr(self.answers, name)) is not None:
                config.has(name, answer, attribute)
        for name in ("metric", "grouping", "targets", "storage"):
            if getattr(self.answers, name) is None:
                raise UserError(f"{name}=null is not valid; it must be one of its options; see {RUN} --help")
        for name, node in (cfg.compressions.get("lowrank") or {}).items():
            if name in cfg:
                config.check_same(f"compressions.lowrank.{name}", node, name, cfg[name])
        for name, node in self.texts(cfg).items():
            config.check_windows(name, node)
            config.check_part(f"{name}.dataset", node.dataset, "calibration")
        for name in ("allocation", "refinement"):
            samples = (cfg.get(name) or {}).get("samples")
            if name not in self.texts(cfg) and is_count(samples, cfg.calibration.samples + 1):
                raise UserError(f"{name}.samples={samples} is not valid; it must be at most calibration.samples")

    def check_cell(self, cell: Cell) -> None:
        """Raises UserError where another compression comes first: spectra and factors are of the dense weights."""
        if (first := next(iter(cell.compressions.values()))) is not self:
            raise UserError(f"compressions: low rank factors the dense weights; list it before {first.axis}")

    def switch_off(self, cfg: DictConfig) -> None:
        cfg.compressions.lowrank = cfg.allocation = cfg.refinement = None

    def ratio(self, cfg: DictConfig) -> float | None:
        return float(cfg.ratio) if getattr(self.answers.allocation, "meets_ratio", True) else None

    def texts(self, cfg: DictConfig) -> dict[str, DictConfig]:
        reads_its_own = cfg.refinement is not None and "dataset" in cfg.refinement
        return {"refinement": cfg.refinement} if reads_its_own else {}

    def key(self, cell: Cell, before: str) -> str:
        return LowRankKeys(cell).compressed(before)

    def check(self, context: Context) -> None:
        """Raises SkippedCell where products of linears cannot be factored as the answers say."""
        if not self.answers.grouping.products:
            return
        if self.answers.metric.needs_gradients:
            raise SkippedCell(
                "grouping=heads: this metric weighs the outputs of linears by their gradients, which the product "
                "of queries and keys does not have; use metric=identity, second_moment, abs_mean or abs_max"
            )
        refinement = self.answers.refinement
        if refinement is not None and not getattr(refinement, "products", False):
            raise SkippedCell(
                "grouping=heads: this refinement fits the factors of single linears; use refinement=distill or none"
            )
        _ = context.sites

    def plan(self, context: Context) -> Plan:
        """The rank of every site; None: it stays dense."""
        with context.record.stage("allocation"):
            return self.answers.allocation(context)

    def ranks(self, plan: Plan) -> Ranks:
        return plan

    def apply(self, context: Context, plan: Plan) -> dict[str, Any]:
        """Put the factors into the model.

        The facts are what a rank costs by site, the ``squared_error`` in the metric's units (None once a refinement
        has changed it), and what the refinement says of itself.
        """
        facts: dict[str, Any] = {"squared_error": 0.0}
        if any(rank is not None for rank in plan.values()):
            facts["squared_error"] = self._closed_form(context, plan) if self.answers.refinement is None else None
            if self.answers.refinement is not None:
                facts |= self._refined(context, plan)
        facts["sites"] = {name: _described(site, plan[name]) for name, site in context.sites.items()}
        return facts

    def _closed_form(self, context: Context, ranks: Plan) -> float:
        """Install the factors of least error; returns the summed squared error."""
        decomposed = artifacts.spectra(context)
        what = (context.model, context.tower, context.sites, ranks)
        with context.record.stage("factorization"):
            return spectra.compress(*what, decomposed, self.answers.storage, context.device)

    def _refined(self, context: Context, ranks: Plan) -> dict[str, Any]:
        """Install the factors that the refinement wrote; returns what it says about them."""
        artifacts.spectra(context)  # so that its time does not count to that of the refinement
        self.answers.refinement.prepare(context)
        refine = partial(self.answers.refinement, context, ranks)
        key = LowRankKeys(context.cell).factors
        folder = context.cached_artifact("refinement", "factors", key, refine, resumable=True)
        what = (context.model, context.tower, context.sites, ranks)
        with context.record.stage("factorization"):
            factors.install_factors(*what, folder, self.answers.storage, context.device)
        facts = folder / "facts.json"
        return {"refinement": json.loads(facts.read_text())} if facts.exists() else {}


def _described(site: Site, rank: int | None) -> dict[str, Any]:
    """Where a site is, and what it costs dense and at ``rank``."""
    costs = {"dense": site.dense, "cost": site.cost(rank)}
    return {"block": site.block, "linears": list(site.members), **costs}
