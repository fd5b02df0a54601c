"""From an ONNX file of a DINOv2 to a plain checkpoint folder of an image classifier, with a head of our own.

torch's exporter keeps the names of weights, but for the matrices of linears, which it transposes and gives numbers:
these are found by the names of the products that read them, ``/backbone/encoder/layer.0/mlp/fc1/MatMul_output_0``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import onnx

IMAGE = 112  # pixels a side of what the head was trained on: 8 × 8 patches
HEAD_SIZE = 64  # of the attention, in every published DINOv2
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as DINOv2's own processor has them
PRODUCT = re.compile(r"/backbone/(.*)/MatMul_output_0")


def convert(file: Path, folder: Path) -> None:
    """Write the encoder of ``file`` with the head ``onnx.HEAD`` into ``folder``, and an image processor.

    Raises UserError where the file's tensors are not those of a DINOv2.
    """
    weights = {**encoder(file), **head()}
    model = skeleton(file, weights)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def load_config(file: Path) -> Any:
    """The transformers configuration of the model in a file. Raises UserError as ``convert`` does."""
    return skeleton(file, {**encoder(file), **head()}).config


def head() -> dict[str, Tensor]:
    """The tensors of our head by transformers' names."""
    return {f"classifier.{name}": tensor for name, tensor in load_file(onnx.HEAD).items()}


def processor(size: int = IMAGE) -> Any:
    """DINOv2's, for square images that are only resized: those here have no margin to crop."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, image_mean=MEAN, image_std=DEVIATION
    )


def encoder(file: Path) -> dict[str, Tensor]:
    """The tensors of the encoder by transformers' names. Raises UserError for a file of another model."""
    graph = onnx.read(file)
    found: dict[str, Tensor] = {}
    for name, values in graph.tensors.items():
        if name.startswith("backbone."):
            found[_inner(name)] = torch.tensor(values)
        for product in graph.products.get(name, ()):
            if values.ndim == 2 and (path := PRODUCT.fullmatch(product)):
                found[f"dinov2.{path[1].replace('/', '.')}.weight"] = torch.tensor(values.T)
    prefix = "dinov2.embeddings"
    if f"{prefix}.cls_token" not in found:
        raise UserError(f"model.path={file}: its weights are not those of a DINOv2, the only ONNX model read here")
    found[f"{prefix}.position_embeddings"] = _positions(file, graph, found[f"{prefix}.cls_token"].shape[-1])
    width = found[f"{prefix}.cls_token"].shape[-1]
    found.setdefault(f"{prefix}.mask_token", torch.zeros(1, width))  # of the training alone, so no export has it
    return found


def _inner(name: str) -> str:
    return "dinov2." + name.removeprefix("backbone.")


def _positions(file: Path, graph: onnx.Graph, width: int) -> Tensor:
    """(1, 1 + patches, width): that of the class token, and those of the patches, which the exporter splits."""
    others = [values for name, values in graph.tensors.items() if "." not in name and values.shape[:1] == (1,)]
    shapes = {values.shape[1]: values for values in others if values.ndim == 3 and values.shape[2] == width}
    if len(shapes) != 2 or 1 not in shapes:
        raise UserError(f"model.path={file}: its position embeddings were not found")
    return torch.cat([torch.tensor(shapes[count]) for count in sorted(shapes)], dim=1)


def skeleton(file: Path, weights: dict[str, Tensor]) -> Any:
    """The model for ``weights``, itself without. Raises UserError where they are not all of a DINOv2's."""
    patch = weights["dinov2.embeddings.patch_embeddings.projection.weight"]
    width, _, size, _ = patch.shape
    patches = weights["dinov2.embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=weights["dinov2.encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        patch_size=size,
        image_size=round(patches**0.5) * size,
        num_labels=weights["classifier.bias"].shape[0],
        architectures=["Dinov2ForImageClassification"],
    )
    with torch.device("meta"):
        model = Dinov2ForImageClassification(config).eval()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise UserError(
            f"model.path={file}: its weights are not those of a DINOv2 ({wrong[0]} and {len(wrong) - 1} more)"
        )
    return model
