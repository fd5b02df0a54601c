"""The errors of a compressed model against its dense original on the same tokens: of linears, blocks, factors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation import robust
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.modules.site import Site, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.lowrank import factors, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.families import Tower
    from lowrank_lab.modules import base, factorized
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    base = LazyModule("lowrank_lab.modules.base")
    factorized = LazyModule("lowrank_lab.modules.factorized")


class OutputError(WindowEvaluator):
    """How far a compressed model is from its dense original on the text of ``dataset``, layer by layer.

    The value is the relative error of the last block's output in the compressed model. The record also has the
    errors of every linear and block (``output_errors``) and what storing the factors, and changing them afterwards,
    adds (``storage_errors``).
    """

    version = versions.OUTPUT_ERROR
    component = "OUTPUT_ERROR"
    models = ("compressed",)

    def check(self, context: Context) -> None:
        """Raises SkippedCell where the inputs of linears are not those of the dense model."""
        for compression in context.cell.compressions.values():
            if not compression.changes_inputs:
                continue
            raise SkippedCell(
                f"{compression.name} changes the inputs of linears, so that they cannot be compared one by one"
            )

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, what it is made of, and its protocol."""
        windows, protocol = self.windows(context)
        dense, batches = context.dense_model(), windows.split(self.batch_size)
        try:
            found = output_errors(dense, context.model, context.tower, batches, context.device)
        except robust.NotFiniteError as error:
            return {"metric": "output error", "value": None, "not_finite": error.layer, "protocol": protocol}
        value = found["blocks"]["accumulated"][-1]
        storage = storage_errors(context, dense)
        return {"metric": "output error", "value": value, **found, "storage": storage, "protocol": protocol}


class RelativeError:
    """‖y − y'‖ / ‖y‖ of an output y and its approximation y' over all batches, summed in float64."""

    def __init__(self) -> None:
        self.error = self.size = self.of_tokens = 0.0
        self.tokens = 0

    def add(self, exact: Tensor, approximate: Tensor, bias: Tensor | None = None) -> None:
        """Add a batch (..., width). A ``bias`` in both outputs does not count to the size of y."""
        y = exact.double()
        error = (y - approximate.to(y)).square().sum(-1)
        size = (y if bias is None else y - bias.to(y)).square().sum(-1)
        self.error += error.sum().item()
        self.size += size.sum().item()
        self.of_tokens += (error / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt().sum().item()
        self.tokens += size.numel()

    def of_all(self, layer: str) -> float:
        """In the Frobenius norm over all tokens, of which a few with massive activations may outweigh the rest.

        Raises NotFiniteError, naming the ``layer``, where an output is not finite.
        """
        if not math.isfinite(self.error + self.size + self.of_tokens):
            raise robust.NotFiniteError(layer)
        return math.sqrt(self.error / self.size) if self.error else 0.0

    def of_each_token(self) -> float:
        """The mean over the tokens of ‖y − y'‖ / ‖y‖ of each alone."""
        return self.of_tokens / self.tokens


def output_errors(
    dense: nn.Module, compressed: nn.Module, tower: Tower, batches: Sequence[Tensor], device: torch.device
) -> dict[str, Any]:
    """The relative errors of the outputs for ``batches`` (batch, length) of token ids.

    ``linears``   by path within the block, a list over the blocks: of each compressed linear on its inputs in the
                  dense model, without its bias; None in the list where it stayed dense
    ``blocks``    lists over the blocks: ``own`` on the block's input in the dense model, ``accumulated``
                  on its input in the compressed model, and both as ``…_of_tokens``, the mean of
                  every token's own relative error. The residual stream is part of the output

    Both models are walked together, so that memory holds the hidden states of one depth. Raises NotFiniteError
    where an output is not finite.
    """
    linears: dict[str, list[float | None]] = {name: [] for name in tower.linears}
    blocks: dict[str, list[float]] = defaultdict(list)
    exact: list[Tensor] = []
    carried: list[Tensor] = []
    dense_walk = walk.walk(dense, tower, batches, device, exact)
    walks = zip(dense_walk, walk.walk(compressed, tower, batches, device, carried), strict=True)
    count = len(walk.blocks_of(dense, tower))
    for (index, dense_block, run_dense), (_, block, run) in progress.track(walks, "output errors", "block", count):
        layer = f"{tower.blocks}.{index}"
        entering, prefix = list(exact), list(carried)
        of_linears = _of_linears(dense_block, block, tower, run_dense)  # moves ``exact`` one block on
        for name, errors in linears.items():
            errors.append(of_linears[name].of_all(f"{layer}.{name}") if name in of_linears else None)
        for kind, states, go in (("own", entering, partial(run, advance=False)), ("accumulated", prefix, run)):
            carried[:] = states
            error = _of_block(block, exact, go)
            blocks[kind].append(error.of_all(layer))
            blocks[f"{kind}_of_tokens"].append(error.of_each_token())
    return {"linears": linears, "blocks": dict(blocks)}


def _of_linears(
    dense_block: nn.Module, block: nn.Module, tower: Tower, run: Callable[[], None]
) -> dict[str, RelativeError]:
    """The errors of the compressed linears of ``block`` on what ``run`` passes through the dense one."""
    errors: dict[str, RelativeError] = {}
    hooks = []
    for name in tower.linears:
        compressed = block.get_submodule(name)
        if base.rank_of(compressed) is not None:
            errors[name] = RelativeError()
            compare = partial(_compare, errors[name], compressed)
            hooks.append(dense_block.get_submodule(name).register_forward_hook(compare))
    run()
    for hook in hooks:
        hook.remove()
    return errors


def _compare(
    error: RelativeError, compressed: nn.Module, linear: Any, inputs: tuple[Tensor], output: Tensor
) -> None:
    error.add(output, compressed(inputs[0]), linear.bias)


def _of_block(block: nn.Module, exact: Sequence[Tensor], run: Callable[[], None]) -> RelativeError:
    """The error of the outputs of ``block`` against ``exact``; ``run`` passes each batch through it."""
    error, targets, device = RelativeError(), iter(exact), next(block.parameters()).device
    hook = block.register_forward_hook(
        lambda _block, _inputs, output: error.add(next(targets).to(device), walk.hidden_states(output))
    )
    run()
    hook.remove()
    return error


def storage_errors(context: Context, dense: nn.Module) -> dict[str, dict[str, float]]:
    """``mse`` and ``mae`` of the products of the factors as the model has them against those of the exact factors.

    By path within the block, the mean over the blocks in which that linear is compressed (Dobi-SVD, Table 8). The
    paper does not say which matrices it compares. This function compares the product W' (out, in) of both factors,
    element by element, since the model multiplies with it. The exact factors are those of the decomposition, or of
    the refinement, before the storage rounds or quantizes them. Compressions after low rank, as pruning, count with
    the storage: the factors are those of the finished model.
    """
    ranks = context.record.data["compressions"]["lowrank"]["plan"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in context.tower.linears}
    blocks = list(
        zip(walk.blocks_of(context.model, context.tower), walk.blocks_of(dense, context.tower), strict=True)
    )
    block_sites = by_block(context.sites, len(blocks))
    with torch.no_grad():
        for index, (block, dense_block) in enumerate(progress.track(blocks, "storage errors", "block")):
            for name, site in block_sites[index].items():
                stored = factorized.factors_of(block, site)
                if stored is None:
                    continue
                exact = exact_factors(context, dense_block, site, ranks[name])
                error = product_error(exact, stored, context.device)
                for member, rows in zip(site.members, error.split(site.outs), strict=True):
                    found[member].append({"mse": rows.square().mean().item(), "mae": rows.abs().mean().item()})
    return {
        name: {kind: sum(error[kind] for error in errors) / len(errors) for kind in ("mse", "mae")}
        for name, errors in found.items()
        if errors
    }


def exact_factors(context: Context, dense_block: nn.Module, site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """``left`` (out, k) and ``right`` (k, in) of a site before the storage touched them."""
    if answers_of(context.cell).refinement is not None:
        return factors.load_factors(context.cell.store.path("factors", LowRankKeys(context.cell).factors), site)
    weight = factorized.site_weight(dense_block, site).to(context.device, torch.float64)
    left, right, _ = spectra.load_spectrum(artifacts.spectra(context), site, context.device).factors(weight, rank)
    return left, right


def product_error(exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """left · right of ``stored`` less that of ``exact``, (out, in), float64."""
    products = [left.to(device, torch.float64) @ right.to(device, torch.float64) for left, right in (exact, stored)]
    return products[1] - products[0]
