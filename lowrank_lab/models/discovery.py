"""Discovery of families without a row in families.py: a forward of a few tokens shows the linears of their blocks.

The model is built without weights and run on fake tensors, which have shapes but no values, so this needs neither
memory nor a checkpoint. Linears with the same input tensor share a statistic; names and shapes identify queries,
keys and values, gate and up. Other weights, such as fused experts, stay dense. Rotations need more, which is not
discovered but needs a row in families.py.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.default_dtype import default_dtype
from lowrank_lab.models.families import Attention, Family, Tower, language_model
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM, of_tokens
from lowrank_lab.models.vision_families import ROWS, row_of

log = logging.getLogger(__name__)

TOKENS = 8  # of the forward
ROUTERS = {"gate", "router", "shared_expert_gate"}  # choose between experts: too few outputs to be compressed
IN_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
IN_MLP = re.compile(r"mlp|ffn|feed_?forward|ff|fc\d?|moe|expert", re.IGNORECASE)
QUERY = re.compile(r"(^|_)(q|query|wq)(_|$)|^q_?(proj|lin)", re.IGNORECASE)
KEY = re.compile(r"(^|_)(k|key|wk)(_|$)|^k_?(proj|lin)", re.IGNORECASE)
VALUE = re.compile(r"(^|_)(v|value|wv)(_|$)|^v_?(proj|lin)", re.IGNORECASE)

_known: dict[tuple[type, str], Family] = {}


def family_of(model: Any) -> Family:
    """The row of a transformers model's ``model_type``, or the family discovered from its class and configuration.

    ``model`` may be without weights, compressed, or without lm_head. Raises UserError for one that has no list of
    blocks with linears, or that needs more of its blocks than their hidden states.
    """
    row = row_of(model.config)
    return row if row is not None else discovered(type(model), model.config)


def discovered(model_class: Any, model_config: Any) -> Family:
    """The family of models of this class and configuration. Raises UserError as ``family_of`` does."""
    key = model_class, json.dumps(model_config.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        tower = _tower(model_class, model_config)
        found = "; ".join(", ".join(group) for group in tower.inputs)
        log.info("%s: found by a forward in its %s: %s", model_config.model_type, tower.blocks, found)
        if tower.stays_dense:
            log.info("%s: stays dense: %s", model_config.model_type, ", ".join(tower.stays_dense))
        _known[key] = language_model(tower)
    return _known[key]


def _tower(model_class: Any, model_config: Any) -> Tower:
    config = copy.deepcopy(model_config)
    config._attn_implementation = "eager"
    # from_pretrained calls this while the default device is meta; fake tensors must be on the CPU. For them grouped
    # products of experts exist in bfloat16 alone.
    with FakeTensorMode(), torch.device("cpu"), default_dtype(torch.bfloat16), torch.no_grad():
        model = model_class(config).eval()
        blocks = _blocks(model)
        calls = _calls(model, model.get_submodule(blocks))
        if calls.tuples and _needs_more_than_states(model, model.get_submodule(blocks)):
            raise _unknown(model_config, "it needs more of its blocks than their hidden states")
    of_blocks = [_groups(of_block) for of_block in calls.linears]
    inputs = tuple(_in_all(of_blocks))
    shapes = {name: calls.shapes[name] for group in inputs for name in group}
    if not inputs:
        raise _unknown(model_config, "its blocks have no linear in common")
    roles, attention = _roles(inputs, shapes)
    dense = _other_weights(model.get_submodule(blocks), {name for group in inputs for name in group})
    return Tower(blocks, inputs, roles, attention, None, calls.tuples, tuple(dense))


def _blocks(model: Any) -> str:
    """The path of the list of blocks: among the lists that are not inside another, the one with most weights."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists) and _linears(module)
    }
    if not outer:
        raise _unknown(model.config, "it has no list of blocks")
    return max(outer, key=lambda path: sum(parameter.numel() for parameter in outer[path].parameters()))


def _unknown(model_config: Any, why: str) -> UserError:
    return UserError(
        f"model type '{model_config.model_type}' has no compressible layer known to lowrank_lab: {why}; rows: "
        f"{', '.join(sorted(ROWS))} (to add one, see CONTRIBUTING.md)"
    )


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, Conv1D))}


class _Calls:
    """The calls of linears in a forward.

    linears  by block, the linears in the order of their calls, each with its input tensors
    shapes   (out, in) of every linear
    tuples   whether blocks return tuples
    """

    def __init__(self, count: int) -> None:
        self.linears: list[dict[str, list[Tensor]]] = [{} for _ in range(count)]
        self.shapes: dict[str, tuple[int, int]] = {}
        self.tuples = False


def _calls(model: nn.Module, blocks: Any) -> _Calls:
    calls, hooks = _Calls(len(blocks)), []

    def record_input(index: int, name: str) -> Any:
        return lambda _module, args: calls.linears[index].setdefault(name, []).append(args[0])

    def record_output(_module: nn.Module, _args: Any, output: Any) -> None:
        calls.tuples = isinstance(output, tuple)

    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(record_output))
        for name, linear in _linears(block).items():
            calls.shapes[name] = _shape(linear)
            hooks.append(linear.register_forward_pre_hook(record_input(index, name)))
    CAUSAL_LM.forward(model, of_tokens(torch.zeros(1, TOKENS, dtype=torch.long)))
    for hook in hooks:
        hook.remove()
    return calls


def _needs_more_than_states(model: nn.Module, blocks: Any) -> bool:
    """Whether its forward fails where blocks give a tuple of their hidden states alone, as models/walk.py has them.

    RWKV's passes a state from block to block. The blocks cannot be used afterwards.
    """
    for block in blocks:
        block.forward = lambda *args, **kwargs: (args[0] if args else kwargs["hidden_states"],)
    try:
        CAUSAL_LM.forward(model, of_tokens(torch.zeros(1, TOKENS, dtype=torch.long)))
    except (ValueError, IndexError):  # not enough values to unpack, no item 1
        return True
    return False


def _shape(linear: Any) -> tuple[int, int]:
    first, second = linear.weight.shape
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def _groups(of_block: dict[str, list[Tensor]]) -> list[tuple[str, ...]]:
    """The linears of a block in the order of their calls; those with the same inputs are one group."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in of_block.items():
        if name.rpartition(".")[2] not in ROUTERS:
            groups.setdefault(tuple(id(tensor) for tensor in tensors), []).append(name)
    return [tuple(group) for group in groups.values()]


def _in_all(of_blocks: list[list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The groups of the first block, with only those linears that every block has."""
    count = Counter(name for groups in of_blocks for group in groups for name in group)
    first = [tuple(name for name in group if count[name] == len(of_blocks)) for group in of_blocks[0]]
    return [group for group in first if group]


def _roles(
    inputs: tuple[tuple[str, ...], ...], shapes: dict[str, tuple[int, int]]
) -> tuple[dict[str, tuple[str, ...]], Attention | None]:
    """The roles, from names and shapes, in the order of calls, and the attention."""
    linears = [name for group in inputs for name in group]
    of_attention = [name for name in linears if IN_ATTENTION.search(name)]
    of_mlp = [name for name in linears if name not in of_attention and IN_MLP.search(name)]
    roles: dict[str, tuple[str, ...]] = {}
    attention = _attention(of_attention)
    if attention is not None:
        projections = tuple(dict.fromkeys((attention.query, attention.key, attention.value)))
        roles["qkv"] = projections
        if not attention.fused and attention.key != attention.value:
            roles["kv"] = (attention.key, attention.value)
        roles["attention"] = (*projections, attention.output)
    if gate_up := _gate_up(inputs, of_mlp, shapes):
        roles["gate_up"] = gate_up
    if of_mlp:
        roles["mlp"] = tuple(of_mlp)
    return roles, attention


def _attention(linears: list[str]) -> Attention | None:
    """The attention, from its linears in the order of calls; None for an unusual set of linears."""
    leaf = lambda name: name.rpartition(".")[2]
    found = [[name for name in linears if kind.search(leaf(name))] for kind in (QUERY, KEY, VALUE)]
    if len(linears) == 4 and all(len(names) == 1 for names in found):
        [query], [key], [value] = found
        [output] = [name for name in linears if name not in (query, key, value)]
        return Attention(query, key, value, output)
    if len(linears) == 2:
        return Attention(linears[0], linears[0], linears[0], linears[1])
    return None


def _gate_up(
    inputs: tuple[tuple[str, ...], ...], of_mlp: list[str], shapes: dict[str, tuple[int, int]]
) -> tuple[str, ...] | None:
    """The gate and up projections: two linears with the same input and shape, or one fused linear.

    A fused one has twice as many outputs as the last linear of the MLP has inputs.
    """
    for group in inputs:
        together = tuple(name for name in group if name in of_mlp)
        if len(together) == 2 and shapes[together[0]] == shapes[together[1]]:
            return together
    if len(of_mlp) == 2 and shapes[of_mlp[0]][0] == 2 * shapes[of_mlp[1]][1]:
        return (of_mlp[0],)
    return None


def _other_weights(blocks: Iterable[nn.Module], linears: set[str]) -> list[str]:
    """The matrices of the blocks that are not among ``linears``, by their paths within a block."""
    names = {
        name.removesuffix(".weight"): None
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and name.removesuffix(".weight") not in linears
    }
    return list(names)
