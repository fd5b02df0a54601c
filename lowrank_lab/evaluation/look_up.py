"""Linears whose products are looked up in tables, against their ordinary products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation import robust
from lowrank_lab.evaluation.chosen_sites import chosen_sites
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.modules.codec import Quantized
from lowrank_lab.modules.look_up import look_up_linear, tables, why_not
from lowrank_lab.modules.site import Site, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.models import walk
    from lowrank_lab.modules import base, quantized
    from lowrank_lab.modules.quantized import QuantizedLinear
    from lowrank_lab.modules.steps import Round
    from lowrank_lab.quantization import inputs
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    walk = LazyModule("lowrank_lab.models.walk")
    base = LazyModule("lowrank_lab.modules.base")
    quantized = LazyModule("lowrank_lab.modules.quantized")
    inputs = LazyModule("lowrank_lab.quantization.inputs")

NEEDS = "eval=look_up needs quantization=kmeans quantization/activations=int4"


class LookUp(WindowEvaluator):
    """How far products from look-up tables are from ordinary ones, and how large the tables are.

    For each chosen linear, or each of its two factors, and each of the first ``seqlen`` tokens of the text, the
    product x Wᵀ is looked up (modules/look_up.py), and computed in float32 from the same rounded operands. The
    value is the largest ‖looked up − ordinary‖ / ‖looked up‖ of a token: the rounding of float32, as tables are
    exact. In the record are also, over all these linears:

    look_ups_per_token          multiplications that look-ups replace
    multiplications_for_tables  those that make the tables, once: one an entry
    table_entries_over_codes    entries of the tables over weights
    table_bytes_over_codes      bytes of the tables, of 64-bit integers, over those of the packed codes

    linears  roles of models/families.py or paths of linears within a block; None for all
    blocks   their indices; None for the middle one
    """

    version = versions.LOOK_UP
    component = "LOOK_UP"

    def __init__(
        self,
        seqlen: int,
        bos: Literal["text", "window"],
        linears: list[str] | None,
        blocks: list[int] | None,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seqlen, max_windows=1, bos=bos, batch_size=1, dataset=dataset)
        checks.filled(optional=True, linears=linears)
        checks.indices(blocks=blocks)
        self.linears = linears
        self.blocks = blocks

    def check(self, context: Context) -> None:
        """Raises SkippedCell where the cell's quantization gives no operands to look up.

        Of a checkpoint that is quantized already, this shows when its modules are there.
        """
        self._chosen(context)
        saved, chosen = context.cell.saved, context.cell.compressions.get("quantization")
        if chosen is None and saved is not None and saved.is_quantized:
            return
        quantization: Any = chosen
        if quantization is None or quantization.method is None or quantization.activations is None:
            raise SkippedCell(NEEDS)
        forms = [quantization.weights]
        if context.cell.is_factored:
            forms += [quantization.left, quantization.right]
        reasons = [why_not(quantization.activations.form, form) for form in forms]
        if all(reasons):
            raise SkippedCell(f"{NEEDS}: {reasons[0]}")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, the sizes, and all of ``linears``.

        Raises SkippedCell where none of them can be looked up.
        """
        windows, protocol = self.windows(context)
        sites = self._chosen(context)
        protocol |= {"blocks": sorted({site.block for site in sites.values()})}
        metric = "difference of look-up products"
        try:
            found = look_up(context, sites, windows)
        except robust.NotFiniteError as error:
            return {"metric": metric, "value": None, "not_finite": error.layer, "protocol": protocol}
        if not found:
            raise SkippedCell(f"{NEEDS}; none of the linears asked for has both")
        total = {
            name: sum(one[name] for one in found) for name in ("codes", "code_bytes", "entries", "table_bytes")
        }
        return {
            "metric": metric,
            "value": max(one["difference"] for one in found),
            "look_ups_per_token": total["codes"],
            "multiplications_for_tables": total["entries"],
            "table_entries_over_codes": total["entries"] / total["codes"],
            "table_bytes_over_codes": total["table_bytes"] / total["code_bytes"],
            "linears": found,
            "protocol": {
                **protocol,
                "linears": list(dict.fromkeys(one["linear"] for one in found)),
                "difference": "norm of a token's outputs",
                "ordinary": "float32",
                "table": "int64",
            },
        }

    def _chosen(self, context: Context) -> dict[str, Site]:
        model, tower = context.skeleton(), context.tower
        blocks = self.blocks or [len(walk.blocks_of(model, tower)) // 2]
        return chosen_sites(model, tower, self.linears, blocks, "eval.look_up")


def look_up(context: Context, sites: dict[str, Site], windows: Tensor) -> list[dict[str, Any]]:
    """``compared`` of every linear in ``sites`` that can be looked up, on ``windows`` (windows, length) of ids.

    Raises NotFiniteError where an input is not finite.
    """
    model, tower = context.model, context.tower
    of_blocks = by_block(sites, len(walk.blocks_of(model, tower)))
    last = max(site.block for site in sites.values())
    found = []
    blocks = walk.walk(model, tower, [windows], context.device)
    for index, block, run in progress.track(blocks, "look-ups", "block", last + 1):
        members = [site.key for site in of_blocks[index].values()]
        for name, linear, step, x in operands(block, members, run):
            if not torch.isfinite(x).all():
                raise robust.NotFiniteError(f"the input of {tower.blocks}.{index}.{name}")
            found.append({"linear": name, "block": index, **compared(step.codes(x), linear.unpacked())})
        if index == last:
            break
    return found


def operands(
    block: nn.Module, members: Iterable[str], run: Callable[[], None]
) -> Iterator[tuple[str, QuantizedLinear, Round, Tensor]]:
    """Of the linears that make up ``members`` those that can be looked up: name, module, rounding, its input.

    The name is that of the member, or of its factor, such as self_attn.q_proj.left. The input (tokens, in),
    float32, is what ``run()`` passes through the block, before it is rounded.
    """
    usable: list[tuple[str, QuantizedLinear, Round]] = []
    for member in members:
        for path, linear in base.plain_parts(block.get_submodule(member), member):
            step = inputs.rounding_of(block, path)
            if not isinstance(linear, quantized.QuantizedLinear) or step is None:
                continue
            if why_not(step.form, linear.format) is None:
                name = member + path[len(member) :].replace(".linear", "")  # without our wrappers
                usable.append((name, linear, step))
    seen: dict[int, Tensor] = {}
    hooks = [
        step.register_forward_pre_hook(lambda step, args: seen.update({id(step): args[0].detach()}))
        for step in {id(step): step for _, _, step in usable}.values()
    ]
    run()
    for hook in hooks:
        hook.remove()
    for name, linear, step in usable:
        if (x := seen.get(id(step))) is not None:  # None: an expert that no token was sent to
            yield name, linear, step, x.reshape(-1, x.shape[-1]).float()


def compared(x: Quantized, weight: Quantized) -> dict[str, Any]:
    """Looked-up against ordinary products of ``x`` (tokens, in) and ``weight`` (out, in), and what tables take.

    ``difference`` is the largest ‖looked up − ordinary‖ / ‖looked up‖ of a token.
    """
    looked_up = look_up_linear(x, weight)
    ordinary = torch.nn.functional.linear(x.dequantize().float(), weight.dequantize().float()).double()
    sizes = looked_up.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    table = tables(weight)
    return {
        "shape": list(weight.codes.shape),
        "difference": ((looked_up - ordinary).norm(dim=1) / sizes).max().item(),
        "codes": weight.codes.numel(),
        "code_bytes": weight.format.packed(tuple(weight.codes.shape)),
        "entries": table.numel(),
        "table_bytes": base.nbytes(table),
    }
