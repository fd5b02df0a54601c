"""What a task reads: how a data set becomes calibration samples, and what their keys depend on.

One class a kind of data. The names here belong to keys of artifacts. No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.calibration.corpora import Part
from lowrank_lab.models.vision_families import IMAGE_TASK, IMAGE_TEXT_TASK, TEXT_TASK, language_config

if TYPE_CHECKING:
    import torch

    from lowrank_lab.calibration import image_texts, images, tokens
    from lowrank_lab.models.tasks.base import Batch
else:
    torch = LazyModule("torch")
    images = LazyModule("lowrank_lab.calibration.images")
    image_texts = LazyModule("lowrank_lab.calibration.image_texts")
    tokens = LazyModule("lowrank_lab.calibration.tokens")


class Data:
    """Data of one kind.

    what       what a data set of the kind has, in words
    corpus     the method by which its corpus gives them
    sampling   the settings of ``calibration`` that choose the samples
    reader     the name, in keys, of what makes inputs of them
    component  the name of their version in versions.py
    artifact   the kind of an artifact of samples
    """

    what: ClassVar[str]
    corpus: ClassVar[str]
    sampling: ClassVar[tuple[str, ...]]
    reader: ClassVar[str]
    component: ClassVar[str]
    artifact: ClassVar[str]

    def make_samples(
        self,
        folder: Path,
        processor: Any,
        corpus: Any,
        part: Part,
        data_root: str | None,
        sampling: Mapping[str, Any],
        bos_id: Callable[[], int],
    ) -> None:
        """Write the calibration samples. ``sampling`` has the settings; ``bos_id`` gives the tokenizer's BOS."""
        raise NotImplementedError

    def load_samples(self, folder: Path, model_config: Any) -> tuple[Batch, dict[str, Any]]:
        """All samples as one batch, and the facts about them for the record.

        Raises UserError for those that the model of ``model_config`` does not take.
        """
        raise NotImplementedError

    def example(self, processor: Callable[[], Any]) -> Batch | None:
        """A batch of one sample of the size that all have for a model; None where the size is not the model's.

        ``processor`` gives what makes the model's inputs.
        """
        return None


class Texts(Data):
    """Windows of token ids."""

    what = "texts"
    corpus = "documents"
    sampling = ("samples", "seqlen", "seed", "sampling", "bos")
    reader = "tokenizer"
    component = "TOKENS"
    artifact = "tokens"

    def make_samples(
        self,
        folder: Path,
        processor: Any,
        corpus: Any,
        part: Part,
        data_root: str | None,
        sampling: Mapping[str, Any],
        bos_id: Callable[[], int],
    ) -> None:
        tokens.make_calibration_tokens(
            folder,
            processor,
            corpus,
            part,
            data_root,
            samples=sampling["samples"],
            seqlen=sampling["seqlen"],
            seed=sampling["seed"],
            sampling=sampling["sampling"],
            bos_id=bos_id() if sampling["bos"] == "window" else None,
        )

    def load_samples(self, folder: Path, model_config: Any) -> tuple[Batch, dict[str, Any]]:
        ids, facts = tokens.load_tokens(folder)
        if ids.size:
            tokens.check_in_vocabulary(int(ids.max()), model_config)
        return {"input_ids": torch.from_numpy(ids)}, facts


class Processed(Data):
    """Samples drawn without replacement, as the model's processor makes them. ``module`` makes their artifact."""

    sampling = ("samples", "seed")
    reader = "processor"
    module: ClassVar[Any]

    def make_samples(
        self,
        folder: Path,
        processor: Any,
        corpus: Any,
        part: Part,
        data_root: str | None,
        sampling: Mapping[str, Any],
        bos_id: Callable[[], int],
    ) -> None:
        self.module.make_samples(folder, processor, corpus, part, data_root, sampling["samples"], sampling["seed"])


class Images(Processed):
    """Images with labels, processed for the model."""

    what = "images"
    corpus = "images"
    component = "IMAGES"
    artifact = "images"
    module: ClassVar[Any] = images

    def load_samples(self, folder: Path, model_config: Any) -> tuple[Batch, dict[str, Any]]:
        batch, facts = images.load_samples(folder)
        images.check_labels(facts["classes"], model_config)
        return batch, facts

    def example(self, processor: Callable[[], Any]) -> Batch | None:
        """A square image: without a crop to a fixed size, another one may have more pixels."""
        return {"pixel_values": images.pixel_values(processor(), [images.blank()])}


class ImageTexts(Processed):
    """Questions about images with their answers, processed for the model."""

    what = "questions about images"
    corpus = "questions"
    component = "IMAGE_TEXTS"
    artifact = "image_texts"
    module: ClassVar[Any] = image_texts

    def load_samples(self, folder: Path, model_config: Any) -> tuple[Batch, dict[str, Any]]:
        batch, facts = image_texts.load_samples(folder)
        tokens.check_in_vocabulary(int(batch["input_ids"].max()), language_config(model_config))
        return batch, facts


DATA: dict[str, Data] = {TEXT_TASK: Texts(), IMAGE_TASK: Images(), IMAGE_TEXT_TASK: ImageTexts()}  # by task


def check_corpus(dataset: str, corpus: Any, data: Data) -> None:
    """Raise UserError where the data set of this name has not what the model's task reads."""
    if not hasattr(corpus, data.corpus):
        raise UserError(
            f"dataset={dataset}: this model reads {data.what}, and that data set has none; choose another"
        )
