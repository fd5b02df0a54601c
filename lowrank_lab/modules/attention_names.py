"""Another attention for a model: transformers finds a model's attention, and its mask, by name.

A changed attention has one more name for each implementation of transformers, whose function it calls in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowrank_lab.basics.errors import SkippedCell

AttentionFunction = Callable[..., tuple[Tensor, "Tensor | None"]]


def use_attention(model: Any, names: Mapping[str, str], attend: AttentionFunction, cannot: str) -> None:
    """Have ``model`` call ``attend``, which gets transformers' own function first and then all that this would get.

    ``names`` has by transformers' name of an implementation that of the changed one. Raises SkippedCell, in the
    words of ``cannot``, where the attention of ``model`` is none of them.
    """
    implementation = model.config._attn_implementation
    if implementation not in names:
        raise SkippedCell(f"{cannot} in attention '{implementation}', only in {' and '.join(names)}")
    # Not when this module is imported: lowrank_lab imports it while transformers is still being imported.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(names[implementation], partial(call_changed, attend, implementation))
    AttentionMaskInterface.register(names[implementation], ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    # A configuration in it that no module has, such as of the text of CLIP's image classifier, is no concern.
    of_modules = {id(getattr(module, "config", None)) for module in model.modules()}
    used = [part for part in model.config.sub_configs if id(getattr(model.config, part)) in of_modules]
    model.set_attn_implementation(dict.fromkeys(("", *used), names[implementation]))
    if model.config._attn_implementation != names[implementation]:
        raise SkippedCell(f"{type(model).__name__} does not let its attention be replaced")


def call_changed(
    attend: AttentionFunction, implementation: str, module: nn.Module, *args: Any, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """``attend``, with the function of transformers; that of ``eager`` is in the file of the architecture."""
    if implementation == "eager":
        original = sys.modules[type(module).__module__].eager_attention_forward
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        original = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(original, module, *args, **rest)
