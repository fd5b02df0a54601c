"""The loss of a model while some of its sites are replaced, for whatever tries replacements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from lowrank_lab.models.families import Tower
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import as_batch, entering_at
from lowrank_lab.modules.site import Site


@contextmanager
def restoring(block: nn.Module, site: Site) -> Iterator[None]:
    """At the end, ``block`` has the linears of ``site`` again that it has now, whatever replaced them."""
    linears = {member: block.get_submodule(member) for member in site.members}
    try:
        yield
    finally:
        for member, linear in linears.items():
            block.set_submodule(member, linear)


def mean_nll(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch | Tensor],
    block: int = 0,
    entering: Sequence[Tensor] = (),
    task: Task = CAUSAL_LM,
) -> float:
    """The mean loss over all that ``batches`` predict (of tokens in nats).

    With a ``block`` above 0 the forward starts there, with the hidden states ``entering`` of each batch.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for number, given in enumerate(batches):
        batch = as_batch(given, device)
        with entering_at(model, tower, block, entering[number].to(device)) if block else nullcontext():
            total += task.loss(model, batch, "sum").item()
        count += task.predicted(batch)
    return total / count
