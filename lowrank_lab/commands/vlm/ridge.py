"""The start of the projector: the answers' embeddings as a linear function of what the vision tower sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_lab.calibration.easy_vqa import Question

DAMPING = 1e-3  # for each position of the data, of features of variance 1


def start(model: Any, tokenizer: Any, features: Tensor, asked: list[Question]) -> None:
    """Set the projector of a LLaVA to the ridge regression of the answers to open questions.

    Every position (images, positions, width) of an image is to become the embedding of each open answer about the
    image, so it becomes about their mean.
    """
    table = model.get_input_embeddings().weight.detach().float()
    rows = [question for question in asked if question.is_open]
    embeddings = {
        answer: table[tokenizer.encode(f" {answer}", add_special_tokens=False)].mean(0)
        for answer in {question.answer for question in rows}
    }
    counts = torch.zeros(len(features))
    sums = torch.zeros(len(features), table.shape[1])
    for question in rows:
        counts[question.image] += 1
        sums[question.image] += embeddings[question.answer]
    mean = features.float().mean((0, 1))
    deviation = features.float().std((0, 1)).clamp(min=1e-6)
    weight, offset = regression((features.float() - mean) / deviation, sums, counts)
    set_linear(model.model.multi_modal_projector, weight, offset, mean, deviation)


def regression(inputs: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (out, in) and ``offset`` (out,) of the ridge regression of rows that repeat.

    Image i stands in ``counts[i]`` rows, for each of its positions ``inputs[i]`` (positions, in); the targets of
    its rows add up to ``sums[i]`` (out,).
    """
    images, positions, width = inputs.shape
    total = counts.sum() * positions
    center = torch.einsum("ipd,i->d", inputs.double(), counts.double()) / total
    offset = sums.double().sum(0) * positions / total
    gram, cross = torch.zeros(width, width).double(), torch.zeros(sums.shape[1], width).double()
    for first in range(0, images, 256):
        part = slice(first, first + 256)
        centered = inputs[part].double() - center
        gram += torch.einsum("ipd,ipe,i->de", centered, centered, counts[part].double())
        cross += (sums[part].double() - counts[part, None].double() * offset).T @ centered.sum(1)
    damped = gram + DAMPING * total * torch.eye(width).double()
    weight = torch.linalg.solve(damped, cross.T).T
    return weight.float(), (offset - weight @ center).float()


def set_linear(projector: Any, weight: Tensor, offset: Tensor, mean: Tensor, deviation: Tensor) -> None:
    """Make LLaVA's two layers the map x ↦ ``weight`` (x − ``mean``)/``deviation`` + ``offset``.

    That is exact where its rank is at most half the hidden width, as gelu(z) − gelu(−z) = z: each right singular
    vector stands in the first layer twice, with both signs.
    """
    pairs = min(projector.linear_1.out_features // 2, weight.shape[1])
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=True)
    scaled = torch.zeros(weight.shape[0], pairs).double()
    known = min(pairs, len(values))
    scaled[:, :known] = left[:, :known] * values[:known]
    first = right[:pairs] / deviation.double()
    with torch.no_grad():
        projector.linear_1.weight.zero_()[: 2 * pairs] = torch.cat([first, -first])
        projector.linear_1.bias.zero_()[: 2 * pairs] = torch.cat([-first @ mean.double(), first @ mean.double()])
        projector.linear_2.weight.zero_()[:, : 2 * pairs] = torch.cat([scaled, -scaled], dim=1)
        projector.linear_2.bias.copy_(offset)
