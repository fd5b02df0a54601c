"""The steps before linears, for tests."""

from __future__ import annotations

from torch import nn

from lowrank_lab.modules.linears import PreparedLinear


def prepared_in(block: nn.Module) -> list[tuple[list[str], nn.Sequential]]:
    """All steps in ``block``, each list with the group of linears that it is before."""
    found: dict[int, tuple[list[str], nn.Sequential]] = {}
    for path, module in block.named_modules():
        if isinstance(module, PreparedLinear):
            group = found.setdefault(id(module.prepare), ([], module.steps))[0]
            group.insert(0 if module.lists_steps else len(group), path)
    return list(found.values())
