"""Architectures as data: which modules are the blocks, and which linears inside one may be compressed.

A family without a row in ``FAMILIES`` is discovered (discovery.py). A row also says what discovery cannot find and
rotations and scales need. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lowrank_lab.basics.errors import SkippedCell, UserError


@dataclass(frozen=True)
class Attention:
    """The linears of a block's attention, by path. Where they are one fused matrix, several have the same path.

    ``plain`` is whether nothing stands between queries and keys but their product: no rotary embedding, no norm.
    """

    query: str
    key: str
    value: str
    output: str
    plain: bool = False

    @property
    def fused(self) -> bool:
        """Whether keys and values come out of the same linear as queries."""
        return self.query == self.value


@dataclass(frozen=True)
class Folding:
    """What must be known to fold rotations and scales of activations into weights.

    ``norm`` is the kind of all norms (``rms_plus_one`` multiplies by 1 + weight); ``norms`` has for each group of
    the tower's ``inputs`` the one that feeds it, within the block (None: another linear does); ``final_norm`` is
    the path of the last. ``residual`` lists the linears whose output is added to the residual stream as it is;
    ``feeds`` has, by linear, the one whose output rows scale its input; ``down`` is the last linear of the MLP.
    """

    norm: Literal["rms", "rms_plus_one", "layer"]
    norms: tuple[str | None, ...]
    final_norm: str
    residual: tuple[str, ...]
    feeds: Mapping[str, str] = field(hash=False)
    down: str


@dataclass(frozen=True)
class Half:
    """One half of a block, by the paths of its modules: it gives x + scale(module(norm(x))); no scale is 1."""

    norm: str
    module: str
    scale: str | None = None


@dataclass(frozen=True)
class Tower:
    """A stack of blocks of one kind: the decoder of a language model, or an image encoder.

    ``blocks`` is the path of the list of transformer blocks. ``inputs`` lists the compressible linears of a
    block, grouped by the input they share: linears of one group have the same inputs, so they share one input
    statistic. Embeddings and lm_head are never listed and never compressed, tied or not. ``roles`` names sets of
    these linears for methods; a fused linear is a role by itself. ``attention`` is None where there is none
    (Mamba), ``folding`` where it is not known. ``tuples`` says whether a block returns its hidden states as the
    first item of a tuple. ``stays_dense`` lists other weights of the blocks, for the record. ``halves`` are the
    attention and the MLP of a block that consists of these two (None: of others, or not known), and ``own_tokens``
    the number of tokens of the model's own (class, distillation) that stand before the patches of an image.
    """

    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    roles: Mapping[str, tuple[str, ...]] = field(hash=False)
    attention: Attention | None = None
    folding: Folding | None = None
    tuples: bool = False
    stays_dense: tuple[str, ...] = ()
    halves: tuple[Half, Half] | None = None
    own_tokens: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.inputs for name in group)


@dataclass(frozen=True)
class Family:
    """Models of one kind: their ``task`` (models/tasks/), and their ``towers`` by name, the compressed one first.

    ``config_of`` has, by tower, the attribute of the model's configuration that holds the tower's own; the
    configuration itself where a tower is not listed.
    """

    task: str
    towers: Mapping[str, Tower] = field(hash=False)
    config_of: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def tower(self) -> Tower:
        """The one that is compressed: the first."""
        return next(iter(self.towers.values()))

    def of_tower(self, name: str | None) -> Family:
        """The same models with another tower first (None: as they are). Raises UserError where they lack it."""
        if name is None:
            return self
        if name not in self.towers:
            raise UserError(f"targets.tower={name}: this model has no such tower; choose {', '.join(self.towers)}")
        return replace(self, towers={name: self.towers[name], **self.towers})

    def config(self, model_config: Any, tower: str | None = None) -> Any:
        """The configuration of a tower, by default the first, out of its model's."""
        attribute = self.config_of.get(next(iter(self.towers)) if tower is None else tower)
        return model_config if attribute is None else getattr(model_config, attribute)


def heads_of(family: Family, model_config: Any) -> int | None:
    """The number of heads of a model's attention; None where it has none."""
    return getattr(family.config(model_config), "num_attention_heads", None)


def folding_of(tower: Tower, what: str = "this transform") -> Folding:
    """The folding of ``tower``. Raises SkippedCell where it is not known."""
    if tower.folding is None:
        raise SkippedCell(
            f"{what} folds changes into norms and linears, but which of them are connected is not known for this "
            "architecture: it has no row in models/families.py"
        )
    return tower.folding


def language_model(tower: Tower) -> Family:
    return Family("causal_lm", {"language": tower})


LLAMA_FOLDING = Folding(
    norm="rms",
    norms=("input_layernorm", None, "post_attention_layernorm", None),
    final_norm="model.norm",
    residual=("self_attn.o_proj", "mlp.down_proj"),
    feeds={"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"},
    down="mlp.down_proj",
)

LLAMA = Tower(
    blocks="model.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    roles={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "kv": ("self_attn.k_proj", "self_attn.v_proj"),
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    attention=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    folding=LLAMA_FOLDING,
)

# There are also norms after attention and MLP, before their outputs are added to the residual stream.
GEMMA = replace(
    LLAMA,
    folding=replace(
        LLAMA_FOLDING,
        norm="rms_plus_one",
        norms=("input_layernorm", None, "pre_feedforward_layernorm", None),
        residual=(),
    ),
)

OPT = Tower(
    blocks="model.decoder.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    roles={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "kv": ("self_attn.k_proj", "self_attn.v_proj"),
        "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        "mlp": ("fc1", "fc2"),
    },
    attention=Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", True),
    folding=Folding(
        norm="layer",
        norms=("self_attn_layer_norm", None, "final_layer_norm", None),
        final_norm="model.decoder.final_layer_norm",
        residual=("self_attn.out_proj", "fc2"),
        feeds={"self_attn.out_proj": "self_attn.v_proj"},
        down="fc2",
    ),
)

# transformers stores these weights as Conv1D, shape (in, out); q, k and v are one fused matrix.
GPT2 = Tower(
    blocks="transformer.h",
    inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    roles={
        "qkv": ("attn.c_attn",),
        "attention": ("attn.c_attn", "attn.c_proj"),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
    },
    attention=Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    folding=Folding(
        norm="layer",
        norms=("ln_1", None, "ln_2", None),
        final_norm="transformer.ln_f",
        residual=("attn.c_proj", "mlp.c_proj"),
        feeds={},
        down="mlp.c_proj",
    ),
)

# q|k|v and gate|up are each one fused linear, compressed as one matrix.
PHI3 = Tower(
    blocks="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    roles={
        "qkv": ("self_attn.qkv_proj",),
        "attention": ("self_attn.qkv_proj", "self_attn.o_proj"),
        "gate_up": ("mlp.gate_up_proj",),
        "mlp": ("mlp.gate_up_proj", "mlp.down_proj"),
    },
    attention=Attention("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
    folding=replace(LLAMA_FOLDING, feeds={}),
)

FAMILIES: dict[str, Family] = {  # of language models, by config.json's model_type; of images: vision_families.py
    "llama": language_model(LLAMA),
    "mistral": language_model(LLAMA),
    "qwen2": language_model(LLAMA),
    "qwen3": language_model(LLAMA),
    "gemma2": language_model(GEMMA),
    "gemma3_text": language_model(GEMMA),
    "opt": language_model(OPT),
    "gpt2": language_model(GPT2),
    "phi3": language_model(PHI3),
}


def kv_cache_values_per_token(config: Any) -> int | None:
    """Numbers cached a token over all layers: 2 · layers · key-value heads · head size; None where none are.

    Under grouped-query attention the key-value heads are fewer than the query heads, and the head size need
    not be hidden_size / heads (Gemma, Qwen3). ``config`` is a transformers PretrainedConfig.
    """
    if (shape := kv_cache_shape(config)) is None:
        return None
    layers, kv_heads, head_size = shape
    return 2 * layers * kv_heads * head_size


def kv_cache_shape(config: Any) -> tuple[int, int, int] | None:
    """Layers, key-value heads and head size; None for a model that caches something else (Mamba, hybrids, MLA)."""
    heads = getattr(config, "num_attention_heads", None)
    layers = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    caches = hasattr(config, "use_cache")  # image encoders do not
    if heads is None or not caches or hasattr(config, "kv_lora_rank") or not layers <= KEYS_AND_VALUES:
        return None
    return config.num_hidden_layers, _kv_heads(config), head_size(config)


KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}  # kinds of layers


def head_size(config: Any) -> int:
    """How many values a head of the attention has. A model may have heads of another size than hidden / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    """Key-value heads, by the different names that families have for them."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon 7B, GPT-BigCode
    if (heads := getattr(config, "num_key_value_heads", None)) is not None:
        return heads
    if getattr(config, "model_type", None) == "mpt" and (heads := getattr(config.attn_config, "kv_n_heads", None)):
        return heads
    return config.num_attention_heads
