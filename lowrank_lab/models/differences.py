"""What differs between the weights of a checkpoint and those of its model, as transformers reports it. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

OLD_BUFFERS = re.compile(r"(^|\.)((self_)?att(n|ention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
SHOWN = 3  # names of each kind in a message


def differences(found: Mapping[str, Any]) -> str:
    """What transformers' ``output_loading_info`` says of weights that a model lacks, or that do not belong to it.

    It knows what a family leaves out: tied weights, and buffers that are computed. Some buffers that old versions
    saved, it no longer knows. Empty where all is well.
    """
    unexpected = [name for name in found["unexpected_keys"] if not OLD_BUFFERS.search(name)]
    sizes = [f"{name} {tuple(has)} instead of {tuple(needs)}" for name, has, needs in found["mismatched_keys"]]
    kinds = {"missing": found["missing_keys"], "of other sizes": sizes, "unknown": unexpected}
    return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


def _first(names: Collection[str]) -> str:
    return ", ".join([*sorted(names)[:SHOWN], *(["…"] if len(names) > SHOWN else [])])
