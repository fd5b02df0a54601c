"""Image encoders and models of images and text as data, as models/families.py has language models. No torch.

The paths are those of transformers' own classes. Embeddings of patches, classifiers, pooling heads and projectors
are never listed and never compressed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.families import FAMILIES, LLAMA, Attention, Family, Folding, Half, Tower

TEXT_TASK, IMAGE_TASK, IMAGE_TEXT_TASK = "causal_lm", "image_classification", "image_text"
# By task, the class of transformers that loads a saved model.
AUTO = {
    TEXT_TASK: "AutoModelForCausalLM",
    IMAGE_TASK: "AutoModelForImageClassification",
    IMAGE_TEXT_TASK: "AutoModelForImageTextToText",
}


def encoder(
    blocks: str,
    query: str,
    key: str,
    value: str,
    output: str,
    folding: Folding,
    scales: tuple[str | None, str | None] = (None, None),
) -> Tower:
    """A tower of blocks with one attention, plain, and an MLP of two linears, after a class token.

    ``scales`` are those of the outputs of attention and MLP.
    """
    qkv = (query, key, value)
    before_attention, _, before_mlp, _ = folding.norms
    assert before_attention is not None and before_mlp is not None
    return Tower(
        blocks=blocks,
        inputs=(qkv, (output,), ("mlp.fc1",), ("mlp.fc2",)),
        roles={"qkv": qkv, "kv": (key, value), "attention": (*qkv, output), "mlp": ("mlp.fc1", "mlp.fc2")},
        attention=Attention(query, key, value, output, plain=True),
        folding=folding,
        halves=(
            Half(before_attention, query.partition(".")[0], scales[0]),
            Half(before_mlp, "mlp", scales[1]),
        ),
        own_tokens=1,
    )


def layer_norms(attention: str, mlp: str, final: str, value: str, output: str) -> Folding:
    return Folding(
        norm="layer",
        norms=(attention, None, mlp, None),
        final_norm=final,
        residual=(output, "mlp.fc2"),
        feeds={output: value},
        down="mlp.fc2",
    )


VIT = encoder(
    "vit.layers",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    layer_norms("layernorm_before", "layernorm_after", "vit.layernorm", "attention.v_proj", "attention.o_proj"),
)
assert VIT.folding is not None

# Its distillation token is one more position, and not all of its classes have it.
DEIT = replace(VIT, blocks="deit.layers", folding=replace(VIT.folding, final_norm="deit.layernorm"), own_tokens=2)

# A scale for each channel (LayerScale) is between a linear and the residual stream.
DINOV2 = encoder(
    "dinov2.encoder.layer",
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    replace(
        layer_norms("norm1", "norm2", "dinov2.layernorm", "attention.attention.value", "attention.output.dense"),
        residual=(),
    ),
    ("layer_scale1", "layer_scale2"),
)

CLIP_VISION = encoder(
    "vision_model.encoder.layers",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    layer_norms(
        "layer_norm1", "layer_norm2", "vision_model.post_layernorm", "self_attn.v_proj", "self_attn.out_proj"
    ),
)
assert CLIP_VISION.folding is not None
CLIP_TEXT = replace(
    CLIP_VISION,
    blocks="text_model.encoder.layers",
    folding=replace(CLIP_VISION.folding, final_norm="text_model.final_layer_norm"),
    halves=None,  # causal: a token may not be merged with a later one
    own_tokens=0,
)
CLIP = Family(
    IMAGE_TASK,
    {"vision": CLIP_VISION, "text": CLIP_TEXT},
    {"vision": "vision_config", "text": "text_config"},
)
# The same modules at the same paths; its pooling attends to all patches, and there is no class token.
SIGLIP = replace(CLIP, towers={"vision": replace(CLIP_VISION, own_tokens=0), "text": CLIP_TEXT})

VISION_FAMILIES: dict[str, Family] = {  # by config.json's model_type
    "vit": Family(IMAGE_TASK, {"vision": VIT}),
    "deit": Family(IMAGE_TASK, {"vision": DEIT}),
    "dinov2": Family(IMAGE_TASK, {"vision": DINOV2}),
    "clip": CLIP,
    "siglip": SIGLIP,
}


def image_text(language: str, vision: str, decoder: Tower = LLAMA, encoder: Tower = CLIP_VISION) -> Family:
    """A language model at the path ``language``, and at ``vision`` the encoder whose features it is given.

    They enter the residual stream of the language model, so that it cannot be rotated by weights of its own; and
    each has a place in its text, so that tokens of the encoder cannot be merged.
    """
    towers = {"language": _within(decoder, language), "vision": replace(_within(encoder, vision), halves=None)}
    folding = towers["language"].folding
    if folding is not None:
        towers["language"] = replace(towers["language"], folding=replace(folding, residual=()))
    return Family(IMAGE_TEXT_TASK, towers, {"language": "text_config", "vision": "vision_config"})


def _within(tower: Tower, path: str) -> Tower:
    """A tower of a model by itself, whose first path is the model's body, as it is in the model at ``path``."""
    place = lambda inner: f"{path}.{inner.partition('.')[2]}"
    folding = None if tower.folding is None else replace(tower.folding, final_norm=place(tower.folding.final_norm))
    return replace(tower, blocks=place(tower.blocks), folding=folding)


PLACES: dict[str, tuple[str, str]] = {  # by model_type, where the language model and the image encoder are
    "llava": ("model.language_model", "model.vision_tower"),
    "llava_next": ("model.language_model", "model.vision_tower"),
    "idefics3": ("model.text_model", "model.vision_model"),
    "smolvlm": ("model.text_model", "model.vision_model"),
}
SIGLIP_VISION = SIGLIP.towers["vision"]
ENCODERS: dict[str, Tower] = {  # by the model_type of a vision_config
    "clip_vision_model": CLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
    "dinov2": DINOV2,
    "idefics3_vision": SIGLIP_VISION,
    "smolvlm_vision": SIGLIP_VISION,
}
IMAGE_TEXT_FAMILIES: dict[str, Family] = {name: image_text(*places) for name, places in PLACES.items()}

ROWS = {**FAMILIES, **VISION_FAMILIES, **IMAGE_TEXT_FAMILIES}


def task_of(model_type: str | None) -> str:
    """The name of the task of models of this type. A type without a row is a language model."""
    row = ROWS.get(model_type or "")
    return TEXT_TASK if row is None else row.task


def row_of(model_config: Any) -> Family | None:
    """The row of models of this transformers configuration; None where there is none.

    Raises UserError for a model of images and text whose language model or encoder has no row.
    """
    if (places := PLACES.get(model_config.model_type)) is None:
        return ROWS.get(model_config.model_type)
    of_text, of_images = model_config.text_config.model_type, model_config.vision_config.model_type
    for what, found, known in (("language model", of_text, FAMILIES), ("image encoder", of_images, ENCODERS)):
        if found not in known:
            raise UserError(
                f"model type '{model_config.model_type}' with a {what} of type '{found}' has no compressible layer "
                f"known to lowrank_lab; known are {', '.join(sorted(known))}"
            )
    return image_text(*places, FAMILIES[of_text].tower, ENCODERS[of_images])


def language_config(model_config: Any) -> Any:
    """What a transformers configuration says of its language model."""
    return model_config.text_config if task_of(model_config.model_type) == IMAGE_TEXT_TASK else model_config
