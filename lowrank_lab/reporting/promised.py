"""The numbers that the cells of a recipe will have, known before any of them has run.

So reports tell which published numbers a recipe can meet at all. Nothing is loaded: neither a model nor a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics.paths import CONF
from lowrank_lab.cells import cell, config, grid
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.harness import Harness
from lowrank_lab.evaluation.output_error import OutputError
from lowrank_lab.evaluation.perplexity import Perplexity
from lowrank_lab.evaluation.perturbed_ranks import PerturbedRanks
from lowrank_lab.evaluation.speed import Speed
from lowrank_lab.evaluation.top1 import Top1
from lowrank_lab.evaluation.truncated_activations import TruncatedActivations
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.records import labels
from lowrank_lab.reporting import measured, models_of_papers
from lowrank_lab.reporting.matching import Ours

Name = tuple[str, str, str]  # metric, data set, variant


@cache
def promised(recipe: str) -> tuple[Ours, ...]:
    """Every number of every cell of a recipe at the papers' scale; their values are 1, 2, 3, … and so differ."""
    models, ratios = _swept(recipe)
    paths = [models_of_papers.path(model) for model in models]
    found: list[Ours] = []
    for cfg in configurations(recipe):
        cell_of_first, evaluators = _outline(cfg)
        dense = "lowrank" not in cell_of_first["compressions"]
        for path, ratio in product(paths, [1.0] if dense else ratios or [cfg.ratio]):
            record = _of(cell_of_first, path, float(ratio))
            of_cell = [(record, name) for name in names(record, evaluators)]
            of_cell += [(measured.truncated(record), name) for name in truncated_names(record, evaluators)]
            for of_record, (metric, dataset, variant) in of_cell:
                found.append(Ours(of_record, metric, dataset, variant, float(len(found) + 1), {}, ""))
    return tuple(found)


@cache
def configurations(recipe: str) -> tuple[DictConfig, ...]:
    """One for each choice of options in a recipe, at the papers' scale: of its first model and its first ratio.

    To compose one takes a tenth of a second. Other models and ratios of the recipe change nothing else in it.
    """
    models, ratios = _swept(recipe)
    first = [f"model={model}" for model in models[:1]] + [f"ratio={ratio}" for ratio in ratios[:1]]
    words = [f"experiment={recipe}", "scale=paper", *first]
    return tuple(grid.configurations(CONF, "config", words))


def _swept(recipe: str) -> tuple[list[str], list[str]]:
    """The options of ``model`` and the ratios that a recipe asks for; none where it has the usual one."""
    experiment = _experiment(recipe)
    ratios = OmegaConf.select(experiment, "hydra.sweeper.params.ratio")
    ratios = OmegaConf.select(experiment, "ratio") if ratios is None else ratios
    models = OmegaConf.select(experiment, "models.paper")
    return _split(models), _split(ratios)


def _split(swept: Any) -> list[str]:
    return [] if swept is None else str(swept).split(",")


def _experiment(name: str) -> Any:
    """The YAML of an experiment, with those that it is based on."""
    node: Any = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    bases = [base for base in node.get("defaults", ()) if isinstance(base, str) and base != "_self_"]
    return OmegaConf.merge(*map(_experiment, bases), node)


def _outline(composed: DictConfig) -> tuple[dict[str, Any], dict[str, Evaluator]]:
    """What the record of a cell has for the tables of papers, and the evaluators that measure its model."""
    cfg = composed.copy()
    OmegaConf.resolve(cfg)
    cfg = config.with_chosen_evaluators(config.with_save(cfg))
    compressions = config.build_all(cfg.compressions)
    plain = config.plain(cfg)
    quantization = compressions.get("quantization")
    chosen = {str(name): config.build(node) for name, node in cfg.eval.items()}
    kind = cell.kind_of(compressions, None)
    evaluators = {name: one for name, one in chosen.items() if one.models is None or kind in one.models}
    of_compressions = {name: one.settings(plain) for name, one in compressions.items()}
    record = {
        "method": cfg.method.name,
        "seed": cfg.seed,
        "config": {**plain, "compressions": list(plain["compressions"])},
        "settings": labels.settings(plain, of_compressions, calibrated=True),
        "quantization": {"name": "none" if quantization is None else quantization.name},
        "compressions": {name: {"plan": {}} for name in compressions},
    }
    return record, evaluators


def _of(outline: dict[str, Any], path: str, ratio: float) -> dict[str, Any]:
    """The outline of a record for another model and another ratio."""
    settings = {**outline["config"], "ratio": ratio, "model": {**outline["config"]["model"], "path": path}}
    record = {**outline, "model": path, "ratio": ratio, "config": settings, "content": {"model": path}}
    return {**record, "key": fingerprint(record)}


def names(record: dict[str, Any], evaluators: dict[str, Evaluator]) -> Iterator[Name]:
    """The names of the numbers that ``measured.numbers`` finds in a record of these evaluators."""
    of_cell = record["config"]
    for name, evaluator in evaluators.items():
        if isinstance(evaluator, Perplexity):
            yield "perplexity", _dataset(of_cell, name), ""
        elif isinstance(evaluator, PerturbedRanks):
            for shift in (0, *evaluator.shifts):
                yield "perplexity_degradation", _dataset(of_cell, name), measured.shift_variant(shift)
        elif isinstance(evaluator, Top1):
            yield "accuracy", _dataset(of_cell, name), measured.top1_variant(of_cell)
            yield "flops_removed", "", ""
        elif isinstance(evaluator, Harness):
            yield from (("accuracy", task, "") for task in evaluator.tasks)
        elif isinstance(evaluator, Speed):
            yield "flops", "", ""
            for batch, prompt in evaluator.settings_measured:
                yield "tokens_per_second", "", measured.setting_variant(batch, prompt)
                yield "speedup", "", measured.setting_variant(batch, prompt)
        elif isinstance(evaluator, OutputError):
            for linear in _linears(of_cell["model"]["path"]):
                yield from ((kind, "", measured.linear_variant(linear)) for kind in ("mse", "mae"))
    yield from ((what, "", "") for what in ("size", "memory", "parameters", "parameters_removed"))


def truncated_names(record: dict[str, Any], evaluators: dict[str, Evaluator]) -> Iterator[Name]:
    """The names of the numbers that ``measured.of_truncated_activations`` finds."""
    for name, evaluator in evaluators.items():
        if isinstance(evaluator, TruncatedActivations):
            yield "perplexity", _dataset(record["config"], name), ""


def _dataset(of_cell: dict[str, Any], evaluator: str) -> str:
    dataset = (of_cell["eval"][evaluator].get("dataset") or of_cell["dataset"])["name"]
    return measured.PTB.get(dataset, dataset)


def _linears(path: str) -> tuple[str, ...]:
    """The linears of a block of the papers' models, whose families stand in their names."""
    return next(family.tower.linears for name, family in FAMILIES.items() if name in path.lower())
