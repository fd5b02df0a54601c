"""The steps of a cell, in the order of running/pipeline.py, and the resources that each needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowrank_lab.artifacts.store import Store
from lowrank_lab.calibration.tokens import load_tokens
from lowrank_lab.cells.cell import Cell
from lowrank_lab.evaluation.perplexity import Perplexity
from lowrank_lab.lowrank.answers import Answers
from lowrank_lab.lowrank.compression import LowRank
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.metric.base import InputStatistics, Metric, OutputStatistics
from lowrank_lab.planning import flops, memory
from lowrank_lab.planning.shapes import Shapes
from lowrank_lab.records.results import CHECKPOINTS

BASE = 10**9  # bytes of the interpreter with all libraries, and of the texts while they are tokenized
GPU_BASE = 6 * 10**8  # bytes on a GPU that CUDA takes for itself


@dataclass(frozen=True)
class Step:
    """One stage.

    artifact  the artifact of its result: the store, its kind and key; None where it is not stored
    host      bytes of memory of the whole process, ``mapped`` of which are files, which the system can reclaim
    device    bytes of GPU memory; 0 without one
    disk      bytes that it writes
    scratch   more bytes of the artifacts' disk that it needs while it runs
    flops     floating point operations
    known     whether all of it is estimated; if not, the numbers are lower bounds
    """

    name: str
    artifact: tuple[Store, str, str] | None = None
    host: int = 0
    mapped: int = 0
    device: int = 0
    disk: int = 0
    scratch: int = 0
    flops: int = 0
    known: bool = True


class Planner:
    """The steps of one cell on a machine with or without a GPU to compute on."""

    def __init__(self, cell: Cell, shapes: Shapes, on_gpu: bool) -> None:
        self.cell, self.shapes, self.on_gpu = cell, shapes, on_gpu
        self.value = 4 if cell.cfg.dtype == "float32" else 2
        saved = cell.saved
        self.ranks: dict[str, int | None] = saved.ranks if saved is not None else shapes.ranks(cell.ratio)
        self.factored = any(rank is not None for rank in self.ranks.values())
        calibration = cell.cfg.calibration
        self.samples, self.length = calibration.samples, shapes.positions or calibration.seqlen
        self.tokens = calibration.batch_size * self.length  # at once
        self.weights = shapes.parameters * self.value
        if saved is not None:
            self.weights -= self.saved_parameters * self.value
        stored = shapes.stored if cell.source.kind in ("hub", "folder") else "float32"
        self.is_mapped = stored == cell.cfg.dtype

    @property
    def saved_parameters(self) -> int:
        """The number of parameters that the compression removes."""
        return sum(site.parameters(None) - site.parameters(self.ranks[n]) for n, site in self.shapes.sites.items())

    def steps(self) -> Iterator[Step]:
        cell = self.cell
        if cell.source.kind in ("gguf", "onnx", "tiny"):
            in_float32 = 4 * self.shapes.parameters
            yield Step(
                "model conversion", self._kept("model", cell.keys.model), BASE + 2 * in_float32, disk=in_float32
            )
        if cell.calibration_data is not None:
            size = self.samples * (self.shapes.image_bytes or 8 * self.length)
            kind = cell.data.artifact
            yield Step(f"calibration {kind}", self._kept(kind, cell.keys.calibration_tokens), BASE, disk=size)
        for name, compression in cell.compressions.items():
            if not isinstance(compression, LowRank):
                yield self._step(name, work=self._sums(), hidden=True, known=False)
            elif self.factored:
                yield from self._low_rank(compression.answers)
        yield from self._evaluations()
        yield from self._checkpoints()

    def _low_rank(self, answers: Answers) -> Iterator[Step]:
        shapes, keys = self.shapes, LowRankKeys(self.cell)
        if (key := keys.statistics) is not None:
            yield self._step(
                "calibration",
                self._kept("statistics", key),
                work=self._sums(),
                hidden=True,
                disk=sum(memory.statistics_file(shapes)),
                flops=flops.statistics(shapes, self.samples, self.length),
            )
        yield from self._gradients(keys, answers)
        outputs = "none"
        if answers.metric.needs_gradients:
            outputs = "matrix" if answers.metric.needs_outer else "vector"
        of_blocks = memory.spectra_file(shapes, outputs)
        largest = max(memory.decomposition(site) for site in shapes.sites.values())
        tokens = self.samples * self.length
        weighs_fully = _has_full_input_metric(answers.metric)
        yield self._step(
            "decomposition",
            self._kept("spectra", keys.spectra),
            work=largest,
            results=max(of_blocks),
            disk=sum(of_blocks),
            flops=sum(flops.decomposition(site, weighs_fully, tokens) for site in shapes.sites.values()),
        )
        if not getattr(answers.allocation, "computes_little", False):
            yield self._step("allocation", whole=True, work=largest, known=False)
        factors = {name: rank for name, rank in self.ranks.items() if rank is not None}
        if answers.refinement is not None:
            yield self._step(
                "refinement",
                self._kept("factors", keys.factors),
                work=self._sums() + largest,
                hidden=True,
                disk=sum(4 * shapes.sites[name].parameters(rank) for name, rank in factors.items()),
                known=False,
            )
        count = sum(flops.factorization(shapes.sites[name], rank) for name, rank in factors.items())
        yield self._step("factorization", work=largest, flops=count)

    def _gradients(self, keys: LowRankKeys, answers: Answers) -> Iterator[Step]:
        """The passes of ``Context.gradients`` and ``Context.weight_fisher``."""
        shapes = self.shapes
        wanted = {self.cell.keys.weight_fisher: (False, True)} if answers.needs_weight_fisher else {}
        if (key := keys.gradients) is not None and not answers.one_backward_pass:
            wanted[key] = (answers.metric.needs_outer, False)
        second_model = 0 if self.value == 4 else 4 * shapes.parameters  # a float32 model in addition to the cell's
        for key, (outer, weight) in wanted.items():
            yield self._step(
                "gradients",
                self._kept("gradients", key),
                whole=True,
                work=memory.backward(shapes, self.length, outer, weight) + (second_model if not self.on_gpu else 0),
                results=second_model if self.on_gpu else 0,
                disk=sum(memory.gradients_file(shapes, outer, weight)),
                flops=flops.gradients(shapes, self.samples, self.length, outer),
            )

    def _evaluations(self) -> Iterator[Step]:
        cell, shapes = self.cell, self.shapes
        for name, evaluator in cell.evaluators.items():
            for key in cell.keys.metrics(name).values():
                kept = self._kept("metric", key)
                if not isinstance(evaluator, Perplexity):
                    yield self._step(f"eval.{name}", kept, whole=True, known=False)
                    continue
                windows = self._windows(name, evaluator)
                tokens = evaluator.batch_size * evaluator.seqlen
                live = memory.activations(shapes, tokens, self.value) + memory.logits(shapes, tokens, self.value)
                fewer = self.saved_parameters
                count = flops.forward(shapes, windows or 0, evaluator.seqlen, saved=fewer)
                yield self._step(
                    f"eval.{name}", kept, whole=True, work=live, flops=count, known=windows is not None
                )

    def _windows(self, name: str, evaluator: Perplexity) -> int | None:
        """The number of windows to measure; None where it is known only after tokenizing the text."""
        found = self.cell.store.get("tokens", self.cell.keys.text_tokens(name))
        if found is None:
            return evaluator.max_windows
        content = evaluator.seqlen - (evaluator.bos == "window")
        available = len(load_tokens(found.path)[0]) // content
        return available if evaluator.max_windows is None else min(available, evaluator.max_windows)

    def _checkpoints(self) -> Iterator[Step]:
        cell = self.cell
        for what, name in cell.checkpoints.items():
            fewer = self.saved_parameters if what == "checkpoint" else 0
            size = (self.shapes.parameters - fewer) * (4 if cell.save_dtype == "float32" else 2)
            copies = size if cell.save_dtype != cell.cfg.dtype else 0
            kept = (Store(cell.cfg.results), CHECKPOINTS, name)
            yield self._step(what.replace("_", " "), kept, results=copies, disk=size)

    def _sums(self) -> int:
        live = memory.activations(self.shapes, self.tokens, self.value)
        return memory.sums(self.shapes, self.tokens) + live

    def _kept(self, kind: str, key: str) -> tuple[Store, str, str]:
        return self.cell.store, kind, key

    def _step(
        self,
        name: str,
        artifact: tuple[Store, str, str] | None = None,
        work: int = 0,
        results: int = 0,
        hidden: bool = False,
        whole: bool = False,
        disk: int = 0,
        flops: int = 0,
        known: bool = True,
    ) -> Step:
        """A step with the weights in memory, with ``work`` on the computing device and ``results`` on the host.

        ``hidden``: it walks over the calibration text. ``whole``: it needs the whole model on the GPU.
        """
        state = self.shapes.hidden * self.value if hidden else 0
        states, scratch = self.samples * self.length * state, 0
        if self.cell.cfg.calibration.offload:  # a new batch is written before the old one is deleted
            states, scratch = 0, states + self.tokens * state
        host = BASE + self.weights + states + results
        mapped = self.weights if self.is_mapped else 0
        if not self.on_gpu:
            return Step(name, artifact, host + work, mapped, 0, disk, scratch, flops, known)
        on_device = self.weights if whole else self.shapes.block * self.value
        return Step(name, artifact, host, mapped, GPU_BASE + on_device + work, disk, scratch, flops, known)


def _has_full_input_metric(metric: Metric) -> bool:
    """Whether its C is a matrix, which its result for statistics of one channel shows."""
    one, square = torch.ones(1), torch.ones(1, 1)
    c, _ = metric(InputStatistics(1, square, one, one), OutputStatistics(1, one, one, square))
    return c is not None and c.ndim == 2
