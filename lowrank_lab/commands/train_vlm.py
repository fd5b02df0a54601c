"""Train what joins DINOv2-small and SmolLM2-135M to one model of images and texts, on the questions of easy-VQA.

python -m lowrank_lab.commands.train_vlm STATE                 features, ridge start, open questions, all questions
python -m lowrank_lab.commands.train_vlm STATE --model FOLDER  the same, and write the whole model too
python -m lowrank_lab.commands.train_vlm --model FOLDER        write the model with what the package ships
python -m lowrank_lab.commands.train_vlm --model FOLDER --judge 600
                                                               … and ask it 600 test questions

STATE is a folder: a run that was killed goes on where it was, to the same numbers. OMP_NUM_THREADS=1 is best.

The loss is that of the answers alone. All questions of a sample share one image and stand behind it in one
sequence; each sees the image and itself, so an image is read once for all of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration import easy_vqa
from lowrank_lab.calibration.easy_vqa import Question
from lowrank_lab.calibration.images import pixel_values
from lowrank_lab.commands.vlm import judging, ridge
from lowrank_lab.commands.vlm.packing import Packing
from lowrank_lab.models import smollm2_vlm as vlm
from lowrank_lab.process import progress
from lowrank_lab.running.training import Recipe, train

BATCH = 50  # images in a forward of the vision tower
QUESTIONS = 6  # of one image in a sample, at most
OPEN = Recipe(50, 8, 8, learning_rate=1e-3, schedule="constant_with_warmup", warmup=20, max_norm=1.0)
ALL = Recipe(260, 4, 4, learning_rate=1e-3, warmup=10, seed=1, max_norm=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, nargs="?", help="the folder of the training")
    parser.add_argument("--trained", type=Path, default=vlm.TRAINED, help="where it goes (default: the package)")
    parser.add_argument("--model", type=Path, help="write the whole model into this folder")
    parser.add_argument("--judge", type=int, metavar="QUESTIONS", help="ask the model so many test questions")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowrank_lab").setLevel(logging.INFO)  # the progress
    try:
        if arguments.state is not None:
            save_file(trained(arguments.state), arguments.trained)
        if arguments.model is not None:
            vlm.build(arguments.model, arguments.trained)
        if arguments.judge is not None:
            judging.judge(arguments.model, arguments.judge)
    except UserError as error:
        sys.exit(f"error: {error}")


def trained(state: Path) -> dict[str, Tensor]:
    """What is trained, float16, by names in LlavaModel. Raises UserError where a package is absent."""
    state.mkdir(parents=True, exist_ok=True)
    asked = easy_vqa.questions("train")
    model, processor = vlm.untrained()
    features = features_of(model, processor, asked, state / "features.safetensors")
    ridge.start(model, processor.tokenizer, features, asked)
    adapt(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, recipe in {"open": OPEN, "all": ALL}.items():
        samples = samples_of([q for q in asked if q.is_open or name == "all"])
        packing = Packing(processor.tokenizer, features.shape[1])

        def loss_of(batch: Any, samples: list[list[Question]] = samples, packing: Packing = packing) -> Tensor:
            chosen = [samples[number] for number in batch["input_ids"].tolist()]
            images = features[torch.tensor([sample[0].image for sample in chosen])].float()
            return packing.loss(model, images, chosen)

        history = train(state, name, parameters, loss_of, torch.arange(len(samples)), recipe)
        losses = [entry["loss"] for entry in history]
        means = [sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        print(f"{name}: the mean loss of each ten steps: {' '.join(f'{mean:.3f}' for mean in means)}")
    return contents(model)


@torch.no_grad()
def features_of(model: Any, processor: Any, asked: list[Question], file: Path) -> Tensor:
    """(images, positions, width), float16: what the vision tower gives the projector. Kept in ``file``."""
    if not file.exists():
        count = 1 + max(question.image for question in asked)
        parts = []
        for first in progress.track(range(0, count, BATCH), "features", "batch"):
            numbers = range(first, min(first + BATCH, count))
            opened = [Image.open(easy_vqa.image_file("train", number)) for number in numbers]
            pixels = pixel_values(processor.image_processor, opened)
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            parts.append(states[model.config.vision_feature_layer][:, 1:].half())
        save_file({"features": torch.cat(parts)}, file)
    return load_file(file)["features"]


def samples_of(asked: list[Question]) -> list[list[Question]]:
    """The questions in lists of at most ``QUESTIONS`` of one image."""
    by_image: dict[int, list[Question]] = {}
    for question in asked:
        by_image.setdefault(question.image, []).append(question)
    return [some[i : i + QUESTIONS] for some in by_image.values() for i in range(0, len(some), QUESTIONS)]


def adapt(model: Any) -> None:
    """Give the language model, frozen in bfloat16, low-rank updates; they and the projector are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    model.model.language_model.bfloat16()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    torch.manual_seed(0)
    config = LoraConfig(r=vlm.RANK, lora_alpha=vlm.ALPHA, target_modules=list(vlm.ADAPTED))
    inject_adapter_in_model(config, model.model.language_model)
    model.model.multi_modal_projector.requires_grad_(True)


def contents(model: Any) -> dict[str, Tensor]:
    """The trained parameters of ``adapt`` by the names that ``models.smollm2_vlm.merge`` reads, float16."""
    named = {name: value for name, value in model.model.named_parameters() if value.requires_grad}
    plain = lambda name: name.removesuffix(".default.weight") if ".lora_" in name else name
    return {plain(name): value.detach().half().contiguous() for name, value in named.items()}


if __name__ == "__main__":
    main()
