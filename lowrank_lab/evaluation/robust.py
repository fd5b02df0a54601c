"""Batches that shrink when memory runs out, and the first layer whose output is not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.process.out_of_memory import unless_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")

log = logging.getLogger(__name__)


def in_batches(rows: Any, batch_size: int | Callable[[Any], int], run: Callable[[Any], Any]) -> Iterator[Any]:
    """``run`` on consecutive batches of ``rows``, a tensor or list; yields what it returns row by row.

    ``batch_size`` may be a function of the batch's first row. Where memory runs out the batch is halved, and none
    after it is larger. Raises the error of a single row that does not fit.
    """
    start, largest = 0, len(rows)
    while start < len(rows):
        size = batch_size if isinstance(batch_size, int) else batch_size(rows[start])
        batch = rows[start : start + min(size, largest)]
        results = run(batch) if len(batch) == 1 else unless_out_of_memory(partial(run, batch))
        if results is None:
            largest = len(batch) // 2
            log.warning("out of memory with a batch of %d: going on with %d", len(batch), largest)
            continue
        yield from results
        start += len(batch)


class NotFiniteError(ArithmeticError):
    """The model's logits are not finite. ``layer`` is the full name of the first layer whose output is not."""

    def __init__(self, layer: str) -> None:
        super().__init__(f"the output of {layer} is not finite")
        self.layer = layer


def check_output(model: nn.Module, ids: Tensor, values: Tensor) -> None:
    """Raises NotFiniteError where ``values`` that ``model`` gave for ``ids`` (batch, length) are not all finite.

    They are its logits, or anything that is finite where these are. The model runs once more to find the layer.
    """
    if not torch.isfinite(values).all():
        run = lambda: model(ids, use_cache=False)
        raise NotFiniteError(first_not_finite(model, run) or "the model (not reproduced when it ran again)")


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first layer of ``model`` to finish with an output in ``run()`` that is not finite; None if all are."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(note(name or "the model")) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _finite(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, (tuple, list)):
        return all(_finite(item) for item in output)
    return True
