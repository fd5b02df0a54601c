"""What a quantization is made of. No torch.

transform → latent → activations and weights, block by block → kv_cache: apply.py reads like that.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from lowrank_lab import checks
from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.cells import config, versions
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.compression import Compression, Plan
from lowrank_lab.errors import UserError
from lowrank_lab.modules.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.models.families import Tower
    from lowrank_lab.modules.codec import Quantized
    from lowrank_lab.quantization.activations import Activations
    from lowrank_lab.quantization.inputs import Inputs
    from lowrank_lab.quantization.kv_cache import KvCache
    from lowrank_lab.running.context import Context


class Transform:
    """Changes ``context.model`` in place, but not what it computes, so that less is lost when it is quantized.

    label              as tables show it
    needs_calibration  whether it reads the calibration text
    needs_seed         whether it draws random numbers
    online             whether it leaves something to do in the forward, which dense weights cannot hold
    no_influence       its settings that change its speed alone
    """

    label = ""
    needs_calibration = False
    needs_seed = False
    online = False
    no_influence: tuple[str, ...] = ()

    def check(self, tower: Tower, quantization: Quantization) -> None:
        """Raises SkippedCell, before any work, where the architecture or what is rounded does not allow it."""

    def __call__(self, context: Context, quantization: Quantization) -> None:
        raise NotImplementedError


class WeightMethod:
    """Quantizes weights one linear at a time, dense ones as factors.

    label         what stands before the format in tables; nothing for plain rounding
    needs_inputs  whether ``quantize`` reads what the linear is given on the calibration text
    needs_rows    whether it also reads a sample of tokens
    needs_seed    whether it draws random numbers
    library       the optional one that does it
    """

    label = ""
    library: str | None = None
    needs_inputs = False
    needs_rows = False
    needs_seed = False

    def check(self, form: Format) -> None:
        """Raises ValueError for a format that the method cannot make."""
        if form.grid == "codebook":
            raise ValueError("weights.grid=codebook is for quantization/method=kmeans; choose integer, nf4 or fp4")

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        """``weight`` (out, in) in the format."""
        raise NotImplementedError

    def quantize_together(
        self, weights: dict[str, Tensor], forms: dict[str, Format], inputs: Inputs | None
    ) -> dict[str, Quantized]:
        """The weights of linears that are given the same input, by name: one by one, unless they share more.

        Raises FloatingPointError, naming the linear, where something is not finite.
        """
        made = {}
        for name, weight in weights.items():
            try:
                made[name] = self.quantize(weight, forms[name], inputs)
            except FloatingPointError as error:
                raise FloatingPointError(f"{name}: {error}") from None
        return made


class Quantization(Compression):
    """What is done to a model, compressed or not, after it has its ranks.

    transform, latent  changes that lose nothing: of the whole model, and between the two factors of a site
    method, weights    how the weights are rounded, and in which format; no method: they stay as they are
    left, right        the formats of the factors
    activations        the format of the inputs of all linears that are quantized; None: as they are
    kv_cache           that of keys and values
    sequential         whether a block is calibrated on what the quantized blocks before it give, or on what these
                       gave before they were quantized
    """

    kind = "quantized"
    kind_in_words = "a dense model in few bits"
    components = ("QUANTIZATION",)

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

    @property
    def needs_calibration(self) -> bool:
        calibrated = any(part is not None and part.needs_calibration for part in (self.transform, self.latent))
        return calibrated or self.calibrates_blocks

    @property
    def calibrates_blocks(self) -> bool:
        """Whether rounding reads what the calibration text gives block by block, so that ``sequential`` matters."""
        of_weights = self.method is not None and (self.method.needs_inputs or self.method.needs_rows)
        return of_weights or (self.activations is not None and self.activations.static)

    @property
    def changes_inputs(self) -> bool:
        return self.transform is not None

    @property
    def needs_seed(self) -> bool:
        return any(part is not None and part.needs_seed for part in (self.transform, self.latent, self.method))

    @property
    def online(self) -> bool:
        """Whether anything is left to do in the forward beside multiplying, which dense weights cannot hold."""
        of_transforms = any(part is not None and part.online for part in (self.transform, self.latent))
        return of_transforms or self.activations is not None or self.kv_cache is not None

    @property
    def name(self) -> str:
        """All of it in a few letters, as tables show it: QuaRot GPTQ INT4 A4 KV4."""
        forms = dict.fromkeys((self.weights.name, self.left.name, self.right.name))
        weights = self.weights.name
        if len(forms) > 1:
            weights += f" ({self.left.name}·{self.right.name})"
        label = self.method.label if self.method is not None else ""
        return self._labelled([label, weights if self.method is not None else ""])

    @property
    def family(self) -> str:
        """The same without the formats of the weights: what one line of a figure has in common."""
        return self._labelled([] if self.method is None else [self.method.label or "RTN"])

    def _labelled(self, of_weights: list[str]) -> str:
        before, after = (self.transform, self.latent), (self.activations, self.kv_cache)
        parts = [part.label for part in before if part is not None]
        parts += [*of_weights, *(part.label for part in after if part is not None)]
        return " ".join(part for part in parts if part)

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
                "targets": None if cell.is_factored else cell.keys.targeted,
                "quantization": answers,
                "seed": cell.cfg.seed if self.needs_seed else None,
                "tokens": cell.keys.calibration_tokens if self.needs_calibration else None,
                "version": versions.QUANTIZATION,
            }
        )

    def check(self, context: Context) -> None:
        """Raises SkippedCell, before any work, where the architecture or what is rounded does not allow it."""
        for part in (self.transform, self.latent):
            if part is not None:
                part.check(context.tower, self)

    def check_cell(self, cell: Cell) -> None:
        """Raises UserError for a model that is quantized already, or where a library that rounds is not there."""
        if cell.source.saved is not None and cell.source.saved.is_quantized:
            raise UserError(f"model.path={cell.cfg.model.path} is quantized already; use quantization=none")
        library = self.method.library if self.method is not None else None
        if library is not None and importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed; run: pip install 'lowrank_lab[quantization]'")

    def plan(self, context: Context) -> Plan:
        """The format of the weights, by site; None: they stay as they are."""
        forms = dict.fromkeys((self.weights.name, self.left.name, self.right.name))
        return dict.fromkeys(context.sites, None if self.method is None else " · ".join(forms))

    def apply(self, context: Context, plan: Plan) -> dict[str, Any]:
        """Quantize ``context.model`` in place."""
        from lowrank_lab.quantization.apply import apply

        with context.record.stage("quantization"):
            apply(context, self)
        return {}
