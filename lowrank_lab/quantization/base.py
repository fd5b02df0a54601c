"""A quantization: what it consists of, and how a model is quantized.

transform → latent → activations and weights, block by block → kv_cache
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import UserError, named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import config, versions
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.compression import Compression, Plan
from lowrank_lab.cells.settings import quantization_settings
from lowrank_lab.modules.formats import Format
from lowrank_lab.process import progress
from lowrank_lab.quantization.activations import Activations
from lowrank_lab.quantization.kv_cache import KvCache
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.models import walk
    from lowrank_lab.models.families import Tower
    from lowrank_lab.modules import attention, factorized, linears, steps
    from lowrank_lab.modules import quantized as quantized_linears
    from lowrank_lab.quantization import inputs, targets
    from lowrank_lab.quantization.inputs import Inputs
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    walk = LazyModule("lowrank_lab.models.walk")
    attention = LazyModule("lowrank_lab.modules.attention")
    factorized = LazyModule("lowrank_lab.modules.factorized")
    linears = LazyModule("lowrank_lab.modules.linears")
    quantized_linears = LazyModule("lowrank_lab.modules.quantized")
    steps = LazyModule("lowrank_lab.modules.steps")
    inputs = LazyModule("lowrank_lab.quantization.inputs")
    targets = LazyModule("lowrank_lab.quantization.targets")


class Transform:
    """Changes ``context.model`` in place, but not its outputs, so that rounding it loses less.

    label              its name in tables
    needs_calibration  whether it reads the calibration text
    needs_seed         whether it draws random numbers
    online             whether it adds work to the forward, which dense weights cannot hold
    mixes_channels     whether it multiplies weights by matrices, such as rotations, and not by scales alone
    no_influence       the names of settings that change the speed alone
    """

    label = ""
    needs_calibration = False
    needs_seed = False
    online = False
    mixes_channels = False
    no_influence: tuple[str, ...] = ()

    def check(self, tower: Tower, quantization: Quantization) -> None:
        """Raises SkippedCell, before any work, where the architecture or the quantization does not allow it."""

    def __call__(self, context: Context, quantization: Quantization) -> None:
        raise NotImplementedError


class Quantization(Compression):
    """Quantization of a model, dense or with factors.

    transform, latent  changes that lose nothing: of the whole model, and between the two factors of a site
    method, weights    how the weights are rounded, and to which format; no method: they are not rounded
    left, right        the formats of the factors
    activations        the format of the inputs of all quantized linears; None: they are not rounded
    kv_cache           the format of keys and values
    sequential         whether a block is calibrated on the outputs of the quantized blocks before it, or of the
                       blocks without quantization
    """

    axis = "quantization"
    kind = "quantized"
    kind_in_words = "a dense model in few bits"
    components = ("QUANTIZATION",)
    in_name = ("weights", "left", "right", "activations", "method.act_order")

    def __init__(
        self,
        transform: Transform | None,
        latent: Transform | None,
        method: WeightMethod | None,
        weights: dict[str, Any],
        left: dict[str, Any],
        right: dict[str, Any],
        activations: Activations | None,
        kv_cache: KvCache | None,
        sequential: bool,
    ) -> None:
        checks.flag(sequential=sequential)
        if all(part is None for part in (transform, latent, method, activations, kv_cache)):
            raise ValueError("nothing is quantized; use quantization=none")
        self.transform, self.latent, self.method = transform, latent, method
        self.weights, self.left, self.right = Format(**weights), Format(**left), Format(**right)
        self.activations, self.kv_cache, self.sequential = activations, kv_cache, sequential
        for form in (self.weights, self.left, self.right):
            if method is not None:
                method.check(form)
        if method is not None and method.needs_exact and not sequential:
            raise ValueError(f"sequential=false is not valid; {method.label} calibrates on quantized blocks")

    @property
    def needs_calibration(self) -> bool:
        calibrated = any(part is not None and part.needs_calibration for part in (self.transform, self.latent))
        return calibrated or self.calibrates_blocks

    @property
    def calibrates_blocks(self) -> bool:
        """Whether rounding depends on the inputs of each block, so that ``sequential`` matters."""
        of_weights = self.method is not None and (self.method.needs_inputs or self.method.needs_rows)
        return of_weights or (self.activations is not None and self.activations.static)

    @property
    def changes_inputs(self) -> bool:
        return self.transform is not None

    @property
    def mixes_channels(self) -> bool:
        return any(part is not None and part.mixes_channels for part in (self.transform, self.latent))

    @property
    def needs_seed(self) -> bool:
        return any(part is not None and part.needs_seed for part in (self.transform, self.latent, self.method))

    def format_of(self, path: str) -> Format:
        """The format of the weight at ``path``: that of left or right factors, or of dense linears."""
        parts = path.split(".")
        return self.left if "left" in parts else self.right if "right" in parts else self.weights

    @property
    def online(self) -> bool:
        """Whether the forward does more than multiply, which dense weights cannot hold."""
        of_transforms = any(part is not None and part.online for part in (self.transform, self.latent))
        return of_transforms or self.activations is not None or self.kv_cache is not None

    @property
    def name(self) -> str:
        """A short name for tables: QuaRot GPTQ INT4 A4 KV4."""
        forms = dict.fromkeys((self.weights.name, self.left.name, self.right.name))
        weights = self.weights.name
        if len(forms) > 1:
            weights += f" ({self.left.name}·{self.right.name})"
        label = self.method.label if self.method is not None else ""
        return self._labelled([label, weights if self.method is not None else ""])

    @property
    def family(self) -> str:
        """The name without the formats of the weights, the same for all points on one line of a figure."""
        return self._labelled([] if self.method is None else [self.method.label or "RTN"])

    def _labelled(self, of_weights: list[str]) -> str:
        before, after = (self.transform, self.latent), (self.activations, self.kv_cache)
        parts = [part.label for part in before if part is not None]
        parts += [*of_weights, *(part.label for part in after if part is not None)]
        return " ".join(part for part in parts if part)

    def settings(self, cfg: dict[str, Any]) -> dict[str, Any]:
        return quantization_settings(cfg, self.name, self.needs_seed)

    def key(self, cell: Cell, before: str) -> str:
        settings = cell.cfg.quantization
        without = ("left", "right") if not cell.is_factored or self.method is None else ()
        answers = config.for_key(settings, without=without)
        if self.method is None:
            answers["weights"] = None
        if not self.calibrates_blocks:
            answers["sequential"] = True
        for name in ("transform", "latent"):
            part = getattr(self, name)
            if part is not None:
                answers[name] = config.for_key(settings[name], without=part.no_influence)
        return fingerprint(
            {
                "model": before,
                "targets": None if cell.is_factored else cell.keys.targets_for_key,
                "quantization": answers,
                "seed": cell.cfg.seed if self.needs_seed else None,
                "tokens": cell.keys.calibration_tokens if self.needs_calibration else None,
                "version": versions.QUANTIZATION,
            }
        )

    def check(self, context: Context) -> None:
        """Raises SkippedCell, before any work, where the architecture or the quantization does not allow it."""
        for part in (self.transform, self.latent):
            if part is not None:
                part.check(context.tower, self)

    def check_cell(self, cell: Cell) -> None:
        """Raises UserError for a model that is quantized already, or where a library that rounds is not there."""
        if cell.saved is not None and cell.saved.is_quantized:
            raise UserError(
                f"model.path={cell.cfg.model.path} is quantized already, or merges tokens; use quantization=none"
            )
        library = self.method.library if self.method is not None else None
        if library is not None and importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed; run: pip install 'lowrank_lab[quantization]'")

    def plan(self, context: Context) -> Plan:
        """The format of the weights, by site; None: they stay as they are."""
        forms = dict.fromkeys((self.weights.name, self.left.name, self.right.name))
        return dict.fromkeys(context.sites, None if self.method is None else " · ".join(forms))

    def apply(self, context: Context, plan: Plan) -> dict[str, Any]:
        """Quantize ``context.model`` in place."""
        with context.record.stage("quantization"):
            quantize_model(context, self)
        return {}


def quantize_model(context: Context, quantization: Quantization) -> None:
    """Quantize ``context.model`` in place; the linears of its sites alone are rounded.

    Raises FloatingPointError, naming the linear, where something is not finite.
    """
    with torch.no_grad():
        torch.manual_seed(context.cell.cfg.seed)  # random numbers must not depend on the work before
        members = targets.members_by_block(context)
        if any(part is not None for part in (quantization.transform, quantization.latent, quantization.method)):
            for block, names in zip(walk.blocks_of(context.model, context.tower), members, strict=True):
                linears.make_plain(block, names, getattr(torch, context.cell.cfg.dtype))
        if quantization.transform is not None:
            quantization.transform(context, quantization)
        if quantization.latent is not None:
            quantization.latent(context, quantization)
        if quantization.activations is not None or quantization.method is not None:
            _round(context, quantization, members)
        if quantization.kv_cache is not None:
            attention.round_cache(context.model, quantization.kv_cache)


def _round(context: Context, quantization: Quantization, members: list[list[str]]) -> None:
    """Round inputs and weights, block by block.

    What needs calibration sees the outputs of the blocks before, quantized if ``sequential``; within a block all
    linears see its inputs rounded and its weights as they were.
    """
    model, tower, method = context.model, context.tower, quantization.method
    activations = quantization.activations
    calibrates = method is not None and (method.needs_inputs or method.needs_rows)
    static = activations is not None and activations.static
    if not (calibrates or static):
        blocks = list(zip(walk.blocks_of(model, tower), members, strict=True))
        for index, (block, names) in enumerate(progress.track(blocks, "quantization", "block")):
            _round_inputs(context, quantization, block, names)
            with named(f"block {index}"):
                _round_weights(context, quantization, block, names, {})
        return
    hidden: list[Tensor] = []
    exact: list[Tensor] = []  # what no rounded block has touched, for a method that needs it
    blocks_run = context.walk(model, hidden=hidden)
    for index, block, run in progress.track(blocks_run, "quantization", "block", len(members)):
        names, run_again = members[index], partial(run, advance=False)
        entering, leaving = list(hidden), None
        if not quantization.sequential:
            run()
            leaving, hidden[:] = list(hidden), entering
        exact_rows: list[Tensor] = []
        if method is not None and method.needs_exact:
            hidden[:] = exact or entering
            exact_rows = _rows_in(context, block, names, run)
            exact, hidden[:] = list(hidden), entering
        _round_inputs(context, quantization, block, names)
        if static:
            with named(f"block {index}"):
                inputs.fix_scales(block, linears.linears_in(block, names), run_again)
        seen = {}
        if method is not None and calibrates:
            paths = linears.linears_in(block, names)
            tokens = context.calibration_positions
            seen = inputs.gather_inputs(block, paths, run_again, tokens, method.needs_rows, context.device)
            for path, rows in zip(paths, exact_rows, strict=False):  # rounding changes paths, not their order
                seen[path].exact_rows = rows
        with named(f"block {index}"):
            _round_weights(context, quantization, block, names, seen)
        if leaving is None:
            run()
        else:
            hidden[:] = leaving


def _rows_in(context: Context, block: nn.Module, members: list[str], run: Callable[[], None]) -> list[Tensor]:
    """The sample of tokens that every linear of ``members`` is given while ``run`` passes the text on."""
    paths = linears.linears_in(block, members)
    found = inputs.sample_inputs(block, paths, run, context.calibration_positions, inputs.ROWS)
    return [found[path][0] for path in paths]


def _round_inputs(context: Context, quantization: Quantization, block: nn.Module, members: list[str]) -> None:
    if quantization.activations is None:
        return
    device = next(block.parameters()).device
    for group in linears.shared_inputs(block, context.tower, members):
        linears.set_steps(block, group, [steps.Round(asdict(quantization.activations.form)).to(device)])


def _round_weights(
    context: Context, quantization: Quantization, block: nn.Module, members: list[str], seen: dict[str, Inputs]
) -> None:
    """Put quantized linears in the place of those that make up ``members``; ``seen`` are inputs by path, if any."""
    method = quantization.method
    if method is None:
        return
    for group in linears.shared_inputs(block, context.tower, members):
        dense: dict[str, Any] = {path: block.get_submodule(path) for path in group}
        weights = {path: factorized.dense_weight(linear).detach() for path, linear in dense.items()}
        forms = {path: quantization.format_of(path) for path in group}
        given, *_ = [seen.pop(path, None) for path in group]  # the same for all of them
        for path, quantized in method.quantize_together(weights, forms, given).items():
            linear = quantized_linears.QuantizedLinear.of(quantized, dense[path].bias)
            block.set_submodule(path, linear.to(weights[path].device))
