"""The shapes of a cell's model, from its configuration alone: this reads no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration import image_texts, images
from lowrank_lab.calibration.question_corpora import Question
from lowrank_lab.cells.cell import Cell
from lowrank_lab.lowrank.ranks import rank_within
from lowrank_lab.models import onnx_conversion, tiny
from lowrank_lab.models.discovery import family_of
from lowrank_lab.models.families import Tower, head_size, heads_of, kv_cache_shape
from lowrank_lab.models.load import load_config
from lowrank_lab.models.tasks.base import Batch
from lowrank_lab.models.tasks.named import TASKS, task_named
from lowrank_lab.models.vision_families import IMAGE_TASK, IMAGE_TEXT_TASK, TEXT_TASK, language_config
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.base import is_linear
from lowrank_lab.modules.counts import count, macs_of_token
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.site import Site
from lowrank_lab.running.context import sites_of_cell


@dataclass(frozen=True)
class Shapes:
    """The sizes of a dense model, and the sites that a cell compresses.

    parameters     of the whole model, tied ones once; ``block`` those of its largest block
    stored         the dtype of the weights on disk
    attention      heads times the size of a head
    widest         the widest input or output of a linear but lm_head
    linears        by block, the (out, in) of its compressible linears, by name
    inputs         by block, the widths of the inputs that these share
    linear_macs    multiply-accumulates a token of all linears but lm_head, ``head_macs`` those of lm_head
    sites          the sites to factor, by name; empty where nothing is factored
    positions      of an image in the blocks, and ``image_bytes`` its pixel values; 0 for texts
    """

    parameters: int
    block: int
    stored: str
    hidden: int
    vocabulary: int
    layers: int
    attention: int
    widest: int
    linears: list[dict[str, tuple[int, int]]]
    inputs: list[list[int]]
    linear_macs: int
    head_macs: int
    sites: dict[str, Site] = field(default_factory=dict)
    positions: int = 0
    image_bytes: int = 0

    def ranks(self, ratio: float) -> dict[str, int | None]:
        """The uniform ranks; other allocations use the same budget in total."""
        if ratio >= 1:
            return dict.fromkeys(self.sites)
        wanted = {name: max(1, rank_within(site, ratio)) for name, site in self.sites.items()}
        return {name: rank if rank <= self.sites[name].last else None for name, rank in wanted.items()}


def with_sites(shapes: Shapes, cell: Cell) -> Shapes:
    """``shapes`` with the sites of ``cell``. Raises SkippedCell or UserError as the cell itself would."""
    if cell.saved is not None:
        return replace(shapes, sites=cell.saved.sites)
    if not any(compression.makes_factors for compression in cell.compressions.values()):
        return shapes
    model_config = config_of(cell)
    skeleton = TASKS[cell.task].skeleton(model_config, cell.cfg.model.trust_remote_code)
    family = family_of(skeleton).of_tower(cell.tower)
    return replace(shapes, sites=sites_of_cell(cell, family.tower, shapes.linears, heads_of(family, model_config)))


def shapes_of(cell: Cell) -> Shapes:
    """The shapes of the cell's dense model. Raises UserError for one that needs its own code."""
    model_config = config_of(cell)
    model: Any = TASKS[cell.task].skeleton(model_config, cell.cfg.model.trust_remote_code)
    of_tower = model_config
    try:
        family = family_of(model).of_tower(cell.tower)
        tower: Tower | None = family.tower
        of_tower = family.config(model_config)
    except UserError:  # which matters only where something is compressed
        tower = None
    shapes = linear_shapes(model, tower) if tower is not None else []
    inputs = [[of_block[group[0]][1] for group in tower.inputs] for of_block in shapes] if tower is not None else []
    blocks: Iterable[nn.Module] = blocks_of(model, tower) if tower is not None else []
    head = model.get_output_embeddings() if cell.task != IMAGE_TASK else None
    has_attention = cell.task == IMAGE_TASK or kv_cache_shape(language_config(model_config)) is not None
    linears: list[Any] = [module for module in model.modules() if is_linear(module)]
    head_macs = 0 if head is None else count(head).macs
    positions, image_bytes = _of_image(cell, model, tower)
    return Shapes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
        stored=str(getattr(model_config, "dtype", None) or "float32").removeprefix("torch."),
        hidden=of_tower.hidden_size,
        vocabulary=getattr(of_tower, "vocab_size", 0),
        layers=of_tower.num_hidden_layers,
        attention=of_tower.num_attention_heads * head_size(of_tower) if has_attention else 0,
        widest=max(max(linear.weight.shape) for linear in linears if linear is not head),
        linears=shapes,
        inputs=inputs,
        linear_macs=macs_of_token(model) - head_macs,
        head_macs=head_macs,
        positions=positions,
        image_bytes=image_bytes,
    )


def _of_image(cell: Cell, model: Any, tower: Tower | None) -> tuple[int, int]:
    """The ``positions`` and ``image_bytes`` of a cell; 0 where its data are texts.

    Of a model of images and text they are those of an image with a question of one word: a lower bound.
    """
    if cell.task == TEXT_TASK or tower is None:
        return 0, 0
    if cell.task == IMAGE_TEXT_TASK:
        question = Question("why?", ("yes",), 0, "blank", "open")
        batch: Batch = image_texts.asked(processor_of(cell), question, images.blank())
    else:
        batch = {"pixel_values": images.pixel_values(processor_of(cell), [images.blank()])}
    positions = task_named(cell.task, cell.tower).positions(lambda: model, tower.blocks, batch)
    return positions, batch["pixel_values"].nbytes


def processor_of(cell: Cell) -> Any:
    """The processor of images of a cell's model, also before its conversion."""
    if cell.source.kind == "tiny":
        return tiny.processor(cell.source.location)
    if cell.source.kind == "onnx":
        return onnx_conversion.processor()
    where = (cell.source.location, cell.source.revision, bool(cell.cfg.model.trust_remote_code))
    return TASKS[cell.task].processor(*where)


def config_of(cell: Cell) -> Any:
    """The configuration of a cell's model, also before its conversion."""
    source = cell.source
    if source.kind == "tiny":  # built from this configuration
        return AutoConfig.for_model(source.location, **tiny.EVERY_CONFIG[source.location])
    if source.kind not in ("gguf", "onnx"):
        return load_config(source.location, source.revision, cell.cfg.model.trust_remote_code)
    if (converted := cell.store.get("model", cell.keys.model)) is not None:
        return load_config(str(converted.path), None, False)
    if source.kind == "onnx":
        return onnx_conversion.load_config(Path(source.location))
    from lowrank_lab.models import gguf_conversion

    return gguf_conversion.load_config(Path(source.location))
