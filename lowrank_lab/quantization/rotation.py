"""Rotations folded into a model, which then computes the same with activations that have no outliers.

With R1 the residual stream h becomes h R1: what reads it (the linears behind a norm) is multiplied by R1 on its
input side, what writes it (embedding, o_proj, down_proj) on its output side. An RMSNorm commutes with R1 once its
weight has moved into the linears that it feeds. With R2 each head's values v become v R2 between v_proj and o_proj.
QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2024) differ in where R1 and R2 come from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.models.families import Tower, folding_of, head_size, kv_cache_shape
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.hadamard import randomized, transform
from lowrank_lab.modules.linears import (
    NormWithSteps,
    change_bias,
    change_weight,
    input_side,
    is_factored,
    output_side,
    set_steps,
)
from lowrank_lab.modules.steps import Hadamard, Rotate, Step

ROWS = 8192  # of an embedding that are in float64 at once


def start(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """QuaRot's rotations: R1 (hidden, hidden) and R2 (blocks, head, head), randomised Hadamards, float64."""
    config = model.config
    layers = range(1, config.num_hidden_layers + 1)
    seeds = [(seed * 1000 + number) % 2**64 for number in (0, *layers)]  # torch takes no larger ones
    of_heads = [randomized(head_size(config), of_head) for of_head in seeds[1:]]
    return randomized(config.hidden_size, seeds[0]), torch.stack(of_heads)


def check(tower: Tower, label: str) -> None:
    """Raises SkippedCell for an architecture whose residual stream cannot be rotated."""
    folding = folding_of(tower, label)
    if folding.norm == "layer":
        raise SkippedCell(
            f"{label} rotates the residual stream, which a LayerNorm, unlike an RMSNorm, does not allow"
        )
    if not folding.residual:
        raise SkippedCell(
            f"{label} rotates the residual stream, which norms after attention and MLP, or the "
            "features of images that enter it, do not allow"
        )


@dataclass
class Rotated:
    """What follows a rotation on either side of one plain linear; None: nothing.

    inputs   ``residual`` (R1), or ``heads``: R2 on the heads next to each other
    outputs  the same; of q|k|v in one matrix only the rows of v
    """

    inputs: Literal["residual", "heads"] | None = None
    outputs: Literal["residual", "heads"] | None = None


def rotated_linears(block: nn.Module, tower: Tower) -> dict[str, Rotated]:
    """The plain linears of ``block`` that follow the rotations, by path."""
    found: dict[str, Rotated] = defaultdict(Rotated)
    for path, _ in behind_norms(block, tower):
        found[path].inputs = "residual"
    for member in folding_of(tower).residual:
        found[output_side(block, member)].outputs = "residual"
    assert tower.attention is not None
    found[output_side(block, tower.attention.value)].outputs = "heads"
    found[input_side(block, tower.attention.output)].inputs = "heads"
    return dict(found)


def behind_norms(block: nn.Module, tower: Tower) -> Iterator[tuple[str, Any]]:
    """The plain linears that read the residual stream, each once, with the norm before them."""
    for group, norm in zip(tower.inputs, folding_of(tower).norms, strict=True):
        if norm is not None:
            for path in dict.fromkeys(input_side(block, member) for member in group):
                yield path, block.get_submodule(norm)


def rotated_weight(weight: Tensor, sides: Rotated, r1: Tensor, r2: Tensor, values: int) -> Tensor:
    """A linear's ``weight`` (out, in) after the rotations ``r1`` (hidden, hidden) and ``r2`` (head, head).

    ``values`` is how wide the values of a token are, over all key-value heads: v is the last rows of its linear.
    """
    if sides.inputs == "residual":
        weight = weight @ r1
    elif sides.inputs == "heads":
        weight = (weight.unflatten(1, (-1, len(r2))) @ r2).flatten(1)
    return rotated_rows(weight, sides, r1, r2, values)


def rotated_rows(weight: Tensor, sides: Rotated, r1: Tensor, r2: Tensor, values: int) -> Tensor:
    """The output side of ``rotated_weight``, for a weight (out, in) or a bias (out,)."""
    if sides.outputs == "residual":
        return r1.T @ weight
    if sides.outputs == "heads":
        others, of_values = weight[:-values], weight[-values:]
        of_heads = of_values.unflatten(0, (-1, len(r2)))
        return torch.cat([others, torch.einsum("hi...,ij->hj...", of_heads, r2).flatten(0, 1)])
    return weight


def values_width(config: Any) -> int:
    """How many values of v a token has, over all key-value heads."""
    shape = kv_cache_shape(config)
    assert shape is not None
    return shape[1] * shape[2]


def fold_norms(model: nn.Module, tower: Tower) -> None:
    """Move the weights of all norms but the last into the linears that they feed."""
    for block in blocks_of(model, tower):
        norms = {}
        for path, norm in behind_norms(block, tower):
            norms[id(norm)] = norm
            change_weight(block, path, partial(torch.mul, norm.weight.detach().double()))
        for norm in norms.values():
            norm.weight.data = torch.ones_like(norm.weight)


def rotate_online(block: nn.Module, member: str, step: Step) -> None:
    """Put an orthogonal ``step`` in front of a ``member`` that alone reads its input, and undo it in its weight."""
    path = input_side(block, member)
    change_weight(block, path, step)  # its rows are rotated like the tokens that they meet
    set_steps(block, [path], [step])


def hadamards(model: Any, tower: Tower, heads: bool, down: bool) -> None:
    """QuaRot's online transforms: of the input of down_proj, and over the ``heads`` before o_proj."""
    for block in blocks_of(model, tower):
        device = next(block.parameters()).device
        if heads:
            assert tower.attention is not None
            output, size = tower.attention.output, head_size(model.config)
            rotate_online(block, output, Hadamard(model.config.num_attention_heads * size, size).to(device))
        if down:
            rotate_online(block, folding_of(tower).down, Hadamard(model.config.intermediate_size, 1).to(device))


def rotate(model: Any, tower: Tower, r1: Tensor, r2: Tensor) -> None:
    """Fold ``r1`` (hidden, hidden) and ``r2`` (blocks, head, head), orthogonal, float64, into ``model``, in place.

    The weights of the norms in the blocks must be 1 (``fold_norms``). That of the last, g, moves into lm_head;
    where the embedding E is also lm_head, E becomes E R1 for both, and what the last norm gives is multiplied by
    R1ᵀ diag(g) R1.
    """
    values = values_width(model.config)
    for block, of_heads in zip(blocks_of(model, tower), r2, strict=True):
        for path, sides in rotated_linears(block, tower).items():
            device = next(block.parameters()).device
            here = {"sides": sides, "r1": r1.to(device), "r2": of_heads.to(device), "values": values}
            change_weight(block, path, partial(rotated_weight, **here))
            change_bias(block, path, partial(rotated_rows, **here))

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm: Any = model.get_submodule(folding_of(tower).final_norm)
    r1, gain = r1.to(norm.weight.device), norm.weight.detach().double()
    norm.weight.data = torch.ones_like(norm.weight)
    if head.weight is embedding.weight:
        step = Rotate(len(r1), len(r1)).to(norm.weight)
        step.blocks.data[0] = r1.T @ (gain.unsqueeze(1) * r1)
        model.set_submodule(folding_of(tower).final_norm, NormWithSteps(norm, [step]))
    else:
        head.weight.data = _by_rows(head.weight, gain.unsqueeze(1) * r1)
    embedding.weight.data = _by_rows(embedding.weight, r1)


def _by_rows(weight: Tensor, right: Tensor) -> Tensor:
    """``weight`` (rows, in) times ``right``, in its dtype, computed in float64."""
    right = right.to(weight.device)
    return torch.cat([(rows.double() @ right).to(weight.dtype) for rows in weight.detach().split(ROWS)])


def rotate_latent(model: nn.Module, tower: Tower) -> None:
    """Rotate the latent values of all factors by Hadamard matrices, folded into both."""
    for block in blocks_of(model, tower):
        factorized = [name for name in tower.linears if is_factored(block, name)]
        for path in dict.fromkeys(input_side(block, member) for member in factorized):
            change_weight(block, path, lambda right: transform(right.T).T)
        for member in factorized:
            change_weight(block, output_side(block, member), transform)
