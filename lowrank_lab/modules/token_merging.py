"""Blocks of an image encoder that go on with fewer tokens: token merging (ToMe: Bolya et al., ICLR 2023).

Between its attention and its MLP, a block merges the r most similar pairs of tokens: each becomes their mean,
weighted by how many patches they stand for already. What are similar are the keys of the attention. After the last
block every patch gets the token that it is part of, so that what follows, a mean over patches or an attention to
them, needs to know nothing of it: it weighs a token by its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.models.families import Half, Tower
from lowrank_lab.models.walk import blocks_of, hidden_states
from lowrank_lab.modules.attention_names import AttentionFunction, use_attention
from lowrank_lab.modules.base import Replacement

MERGING_NAMES = {"sdpa": "lowrank_lab_merging_sdpa", "eager": "lowrank_lab_merging_eager"}  # by transformers' name
ON_TENSOR = "lowrank_lab_tokens"  # the attribute of hidden states with what their tokens are


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a batch of images are.

    source  (batch, tokens before the first block), int64: by token there, the one that it is part of now
    sizes   (batch, tokens now), float32: how many each stands for
    """

    source: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Tokens:
        """Those of ``states`` (batch, tokens, width), none of them merged."""
        batch, count, _ = states.shape
        source = torch.arange(count, device=states.device).expand(batch, count)
        return cls(source, torch.ones(batch, count, device=states.device))

    @property
    def merged(self) -> bool:
        return self.source.shape[1] > self.sizes.shape[1]

    def merge(self, states: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tokens]:
        """``states`` (batch, tokens, width) as ``count`` tokens, and what these are.

        ``places`` (batch, tokens) say which of them each becomes: their mean by sizes.
        """
        sizes = self.sizes.new_zeros(len(states), count).scatter_add(1, places, self.sizes)
        weighted = states * self.sizes[..., None]
        sums = weighted.new_zeros(len(states), count, states.shape[2]).scatter_add(
            1, places[..., None].expand_as(weighted), weighted
        )
        return (sums / sizes[..., None]).to(states.dtype), Tokens(places.gather(1, self.source), sizes)

    def restored(self, states: Tensor) -> Tensor:
        """(batch, tokens before the first block, width): to each the state of that which it is part of."""
        if not self.merged:
            return states
        return states.gather(1, self.source[..., None].expand(-1, -1, states.shape[2]))


@dataclass
class Attended:
    """What a block tells its attention, and what it hears.

    bias  (batch, 1, 1, tokens), to add to the scores; None: nothing
    keys  their mean over heads, (batch, tokens, head size)
    """

    bias: Tensor | None
    keys: Tensor | None = None


# Of the block that runs; not an argument of the attention, as SigLIP's passes none of those on.
running_block: ContextVar[Attended | None] = ContextVar("running_block", default=None)


@contextmanager
def attending(bias: Tensor | None) -> Iterator[Attended]:
    """Within it, the attention of a block runs."""
    attended = Attended(bias)
    token = running_block.set(attended)
    try:
        yield attended
    finally:
        running_block.reset(token)


def attend_to_merged(
    original: AttentionFunction,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *args: Any,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention ``original``, in a block that merges with what it tells and hears.

    Raises ValueError for a mask, which would be of tokens that are merged.
    """
    if (attended := running_block.get()) is not None:
        if mask is not None:
            raise ValueError("a model that merges tokens takes no attention mask")
        attended.keys = key.mean(1)
        if attended.bias is not None:
            mask = attended.bias.to(query.dtype)
    return original(module, query, key, value, mask, *args, **rest)


def places_of(keys: Tensor, r: int, own: int) -> Tensor:
    """(batch, tokens), int64: the place of every token after ``r`` pairs were merged (ToMe, §3 and Appendix D).

    ``keys`` (batch, tokens, head size) say what is similar; the first ``own`` tokens are not merged, and stay
    first. The tokens are dealt in turn to two sets A and B. Each of A is joined to the most similar of B, the r
    most similar pairs are merged, and the two sets follow one another.
    """
    unit = nn.functional.normalize(keys, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    own_a, own_b = (own + 1) // 2, own // 2
    scores[:, :own_a] = -torch.inf
    scores[:, :, :own_b] = -torch.inf
    best, partner = scores.max(-1)
    ordered = best.argsort(dim=-1, descending=True, stable=True)
    merged, stay = ordered[:, :r], ordered[:, r:].sort(-1).values
    a = torch.arange(stay.shape[1], device=keys.device)
    b = torch.arange(scores.shape[2], device=keys.device)
    place_b = torch.where(b < own_b, 2 * b + 1, len(a) + b).expand(len(keys), -1)
    place_a = torch.empty_like(ordered)
    place_a.scatter_(1, stay, torch.where(a < own_a, 2 * a, a + own_b).expand_as(stay))
    place_a.scatter_(1, merged, place_b.gather(1, partner.gather(1, merged)))
    places = keys.new_empty(keys.shape[:2], dtype=torch.long)
    places[:, ::2], places[:, 1::2] = place_a, place_b
    return places


class TokenMerging(Replacement):
    """The forward of a block with two halves, with ``r`` tokens merged between them.

    It is added to the block as ``token_merging``.

    own           how many tokens stand first and are never merged
    proportional  whether a token counts in the attention as often as it has patches: the logarithm of its size is
                  added to its scores (Eq. 1)
    first, last   whether the block is the first, the last of its model

    No more than half of the tokens are merged. As in evaluation, there is no dropout.
    """

    kind = "token_merging"
    online = True

    def __init__(
        self, r: int, own: int, proportional: bool, first: bool, last: bool, halves: Sequence[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.r, self.own, self.proportional = r, own, proportional
        self.first, self.last = first, last
        self.attention, self.mlp = (Half(**half) for half in halves)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> TokenMerging:
        return cls(**description)

    def describe(self) -> dict[str, Any]:
        names = ("r", "own", "proportional", "first", "last")
        halves = [asdict(half) for half in (self.attention, self.mlp)]
        return {**{name: getattr(self, name) for name in names}, "halves": halves}

    @classmethod
    def set_up(cls, model: Any) -> None:
        """Raises SkippedCell where the attention of ``model`` is none of MERGING_NAMES."""
        use_attention(model, MERGING_NAMES, attend_to_merged, "tokens cannot be merged")
        for block in list(model.modules()):
            if isinstance(block._modules.get("token_merging"), cls) and not isinstance(block, MergingBlock):
                kind: Any = type(block)
                block.__class__ = merging_class(kind)

    def forward(self, block: nn.Module, states: Tensor, *args: Any, **rest: Any) -> Tensor:
        """What ``block`` makes of ``states`` (batch, tokens, width), given its other arguments.

        Raises RuntimeError for states that are not what the block before gave, as their tokens are not known.
        """
        tokens = Tokens.of(states) if self.first else getattr(states, ON_TENSOR, None)
        if tokens is None:
            raise RuntimeError("the hidden states have come to another block than the next, or were copied between")
        bias = tokens.sizes.log()[:, None, None] if self.proportional and tokens.merged else None
        with attending(bias) as attended:
            states = half_of(block, self.attention, states, *args, **rest)
        count = states.shape[1] - tokens_to_merge(states.shape[1], self.r, self.own)
        if count < states.shape[1]:
            if attended.keys is None:
                raise RuntimeError("the attention of a block that merges tokens was replaced")
            places = places_of(attended.keys, states.shape[1] - count, self.own)
            states, tokens = tokens.merge(states, places, count)
        states = half_of(block, self.mlp, states)
        if self.last:
            return tokens.restored(states)
        setattr(states, ON_TENSOR, tokens)
        return states


def tokens_to_merge(count: int, r: int, own: int) -> int:
    """How many of ``count`` tokens a block merges that is to merge ``r``: at most half of the patches."""
    return min(r, (count - own) // 2)


def half_of(block: nn.Module, half: Half, states: Tensor, *args: Any, **rest: Any) -> Tensor:
    """The states after one half of a block."""
    added = hidden_states(block.get_submodule(half.module)(block.get_submodule(half.norm)(states), *args, **rest))
    return states + (added if half.scale is None else block.get_submodule(half.scale)(added))


class MergingBlock(nn.Module):
    """What is put before the class of a block: its ``token_merging`` has its forward."""

    token_merging: TokenMerging

    def forward(self, states: Tensor, *args: Any, **rest: Any) -> Any:
        return self.token_merging(self, states, *args, **rest)


@cache
def merging_class(block: Any) -> Any:
    return type(block.__name__, (MergingBlock, block), {})


def merge_tokens(model: Any, tower: Tower, schedule: Sequence[int], proportional: bool) -> None:
    """Have the blocks of ``tower``, which has halves, merge the tokens of ``schedule``, one number for each."""
    assert tower.halves is not None
    blocks, halves = blocks_of(model, tower), [asdict(half) for half in tower.halves]
    for index, (block, r) in enumerate(zip(blocks, schedule, strict=True)):
        first, last = index == 0, index == len(blocks) - 1
        block.token_merging = TokenMerging(r, tower.own_tokens, proportional, first, last, halves)
    TokenMerging.set_up(model)


def merging_in(model: nn.Module) -> list[TokenMerging]:
    """The merging of every block of a model in their order; empty for a model that merges no tokens."""
    return [module for module in model.modules() if isinstance(module, TokenMerging)]
