"""The multiply-accumulates of a forward of one image, and how many tokens each block has of it.

Those of the blocks follow from shapes. Those before and after them (the embedding of patches, pooling, classifier)
are counted by torch on a model without weights, as architectures differ in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_lab.models.families import Family, Tower, heads_of
from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.walk import blocks_of, entering_at
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.token_merging import merging_in, tokens_to_merge


def macs_of_image(model: nn.Module, skeleton: Any, family: Family, task: Task, image: Tensor) -> dict[str, Any]:
    """The sizes of a forward of ``image`` (1, channels, height, width); ``model`` may be compressed.

    ``skeleton`` is the dense model on the meta device. Returns

    pixels      height and width
    tokens      how many tokens each block has in its attention, and then how many the last has in its MLP
    macs        multiply-accumulates of all: linears, products of attention, what is compared to merge tokens
    macs_dense  those of the dense model
    """
    tower, heads = family.tower, heads_of(family, skeleton.config)
    assert tower.attention is not None and heads is not None
    like = torch.empty(1, *image.shape[1:], device="meta")
    at_first = task.positions(lambda: skeleton, tower.blocks, {"pixel_values": like})
    tokens = tokens_by_block(model, tower, at_first)
    widths = [shapes[tower.attention.query][0] for shapes in linear_shapes(skeleton, tower)]  # of all heads
    outside = _outside_blocks(skeleton, family, task, like, at_first)
    return {
        "pixels": list(image.shape[2:]),
        "tokens": tokens,
        "macs": outside + macs_of_blocks(model, tower, widths, heads, tokens),
        "macs_dense": outside + macs_of_blocks(skeleton, tower, widths, heads, [at_first] * len(tokens)),
    }


def tokens_by_block(model: nn.Module, tower: Tower, at_first: int) -> list[int]:
    """How many tokens enter each block, ``at_first`` the first, and then how many leave the last."""
    merging = merging_in(model)
    tokens = [at_first] * (1 + len(blocks_of(model, tower)))
    for index, one in enumerate(merging):
        tokens[index + 1] = tokens[index] - tokens_to_merge(tokens[index], one.r, one.own)
    return tokens


def macs_of_blocks(model: nn.Module, tower: Tower, widths: Sequence[int], heads: int, tokens: Sequence[int]) -> int:
    """The multiply-accumulates of all blocks for an image with so many ``tokens`` (``tokens_by_block``).

    ``widths`` are those of the queries of all ``heads``, by block: the products of attention have them whatever the
    rank of their linears.
    """
    macs = 0
    for block, width, (entering, leaving) in zip(blocks_of(model, tower), widths, pairwise(tokens), strict=True):
        linears = lambda role, block=block: sum(count(block.get_submodule(name)).macs for name in tower.roles[role])
        macs += entering * linears("attention") + leaving * linears("mlp")
        macs += 2 * entering**2 * width  # queries with keys, weights with values
        if leaving < entering:
            macs += (entering // 2) * (entering - entering // 2) * (width // heads)  # keys of A with keys of B
    return macs


def _outside_blocks(skeleton: Any, family: Family, task: Task, image: Tensor, tokens: int) -> int:
    """The multiply-accumulates of all but the blocks, by torch's counter."""
    tower = family.tower
    states = torch.empty(1, tokens, family.config(skeleton.config).hidden_size, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, entering_at(skeleton, tower, len(blocks_of(skeleton, tower)), states):
        task.forward(skeleton, {"pixel_values": image})
    return counter.get_total_flops() // 2
