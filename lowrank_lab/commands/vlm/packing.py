"""Questions about one image in one sequence, each as if it stood alone behind the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowrank_lab.calibration.easy_vqa import Question


def prompt(question: str) -> str:
    """What stands between an image and an answer, as the model's chat template has it."""
    return f"\n{question} Answer:"


class Packing:
    """Packs for a tokenizer, and for images of so many positions."""

    def __init__(self, tokenizer: Any, image_tokens: int) -> None:
        self.tokenizer, self.image_tokens = tokenizer, image_tokens

    def tokens(self, question: Question) -> tuple[list[int], int]:
        """Those of a question with its answer and the end of it, and how many of them are the answer's."""
        plain = lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        answer = [*plain(f" {question.answer}"), self.tokenizer.eos_token_id]
        return plain(prompt(question.text)) + answer, len(answer)

    def packed(self, samples: list[list[Question]]) -> dict[str, Tensor]:
        """Sequences of the questions of some images, without the positions of the images before them.

        input_ids     (samples, length)
        labels        (samples, length): −100 but for the tokens of answers
        position_ids  (samples, image tokens + length): each question follows the image directly
        mask          (samples, 1, image tokens + length, the same), bool: what a position sees
        """
        sequences = [[self.tokens(question) for question in sample] for sample in samples]
        length = max(sum(len(ids) for ids, _ in sequence) for sequence in sequences)
        ids = torch.full((len(samples), length), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        within = torch.zeros_like(ids)  # place within the question
        owner = torch.zeros_like(ids)  # which question, from 1; 0: padding
        for row, sequence in enumerate(sequences):
            end = 0
            for number, (tokens, answer) in enumerate(sequence, start=1):
                start, end = end, end + len(tokens)
                ids[row, start:end] = torch.tensor(tokens)
                labels[row, end - answer : end] = ids[row, end - answer : end]
                within[row, start:end] = torch.arange(len(tokens))
                owner[row, start:end] = number
        image = torch.arange(self.image_tokens).expand(len(samples), -1)
        owner = torch.cat([torch.full_like(image, -1), owner], dim=1)
        seen = (owner[:, None] == owner[:, :, None]) | (owner == -1)[:, None]
        causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([image, within + self.image_tokens], dim=1),
            "mask": (seen & causal)[:, None],
        }

    def loss(self, model: Any, features: Tensor, samples: list[list[Question]]) -> Tensor:
        """The mean loss of the answers' tokens, given the features (samples, image tokens, width) of the images."""
        batch = self.packed(samples)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        images = model.model.multi_modal_projector(features).to(embedded.dtype)
        states = model.model.language_model(
            inputs_embeds=torch.cat([images, embedded], dim=1),
            attention_mask=batch["mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state[:, self.image_tokens - 1 : -1]
        asked = batch["labels"] != -100
        return cross_entropy(model.lm_head(states[asked]).float(), batch["labels"][asked])
