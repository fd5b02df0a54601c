"""Image classifiers: their rows, their data, every kind of compression on them, and top-1."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.gradients import load_gradients, make_gradients
from lowrank_lab.calibration.image_corpora import IdxFiles, ImageFolder, MnistOfMlxtend
from lowrank_lab.calibration.images import chosen_samples
from lowrank_lab.calibration.statistics import load_statistics, make_statistics
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.spectra import compress, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models import onnx_conversion
from lowrank_lab.models.tasks.image_classification import IMAGE_CLASSIFICATION as TASK
from lowrank_lab.models.vision_families import VISION_FAMILIES
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context, pick_device
from tests.images import CLASSES, image_folder, vision_words
from tests.sites import sites_in

CPU = torch.device("cpu")
PIXELS = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(5)


@pytest.fixture(params=VISION_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, vision_folders: dict[str, Path]) -> Any:
    return TASK.load(str(vision_folders[family]), None, "float32", False)


def test_the_rows_name_every_linear_of_a_block(model, family):
    """Of both towers, where there are two."""
    both = AutoModel.from_config(model.config) if len(VISION_FAMILIES[family].towers) > 1 else model
    for tower in VISION_FAMILIES[family].towers.values():
        for block in blocks_of(both, tower):
            assert {n for n, m in block.named_modules() if type(m).__name__ == "Linear"} == set(tower.linears)
            assert tower.folding is not None
            for norm in tower.folding.norms:
                assert norm is None or type(block.get_submodule(norm)).__name__ == "LayerNorm"
        assert type(both.get_submodule(tower.folding.final_norm)).__name__ == "LayerNorm"


def test_statistics_are_of_all_tokens_of_the_images(model, family, tmp_path):
    """And the gradients those of the cross-entropy: of each image by itself, through every block."""
    tower, inputs = VISION_FAMILIES[family].tower, {}
    hooks = [
        block.get_submodule(group[0]).register_forward_pre_hook(
            lambda _m, args, place=(index, group): inputs.setdefault(place, []).append(args[0].detach())
        )
        for index, block in enumerate(blocks_of(model, tower))
        for group in tower.inputs
    ]
    with torch.no_grad():
        model(pixel_values=PIXELS)
    for hook in hooks:
        hook.remove()
    batches = [{"pixel_values": PIXELS[:3]}, {"pixel_values": PIXELS[3:]}]
    make_statistics(tmp_path, model, tower, batches, CPU, task=TASK)
    for (index, group), [seen] in inputs.items():
        rows = seen.reshape(-1, seen.shape[-1]).double()
        found = load_statistics(tmp_path, index, group, CPU)
        assert found.tokens == len(rows)
        torch.testing.assert_close(found.second_moment, rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)
    positions = TASK.positions(lambda: TASK.skeleton(model.config, False), tower.blocks, {"pixel_values": PIXELS})
    assert positions == len(next(iter(inputs.values()))[0].flatten(0, 1))
    gradients = tmp_path / "gradients"
    gradients.mkdir()
    images = [{"pixel_values": PIXELS[i : i + 1], "labels": LABELS[i : i + 1]} for i in range(len(PIXELS))]
    make_gradients(gradients, model, tower, images, CPU, weight=True, task=TASK)
    last = blocks_of(model, tower)[-1].get_submodule("mlp.fc2")
    expected = torch.zeros_like(last.weight)
    for image in images:
        model.zero_grad()
        TASK.loss(model, image).backward()
        expected += last.weight.grad.square() / len(images)
    found_rows = load_gradients(gradients, len(blocks_of(model, tower)) - 1, "mlp.fc2", CPU).row_fisher
    torch.testing.assert_close(found_rows.float(), expected.sum(1), rtol=1e-3, atol=1e-12)


def test_full_rank_reproduces_the_dense_logits(model, family, tmp_path):
    tower = VISION_FAMILIES[family].tower
    dense = TASK.logits(model, {"pixel_values": PIXELS}).detach()
    sites = sites_in(model, tower)
    make_spectra(tmp_path, model, tower, sites, Identity(), None, None, CPU)
    compress(model, tower, sites, {name: site.full for name, site in sites.items()}, tmp_path, Absorb(0.5), CPU)
    assert any(type(module).__name__ == "FactorizedLinear" for module in model.modules())
    torch.testing.assert_close(TASK.logits(model, {"pixel_values": PIXELS}), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "words",
    [
        ["method=kron", "quantization=gptq"],
        ["method=dense", "quantization=smoothquant", "pruning=magnitude"],
        ["method=qsvd", "targets=qkv"],
        ["method=svdllm_v2", "allocation=strs", "allocation.samples=2"],
        ["method=dobi", "allocation.steps=2"],
        ["method=wsvd"],
        ["method=fwsvd", "refinement=sequential_update"],
        ["method=comcat", "quantization=int8", "pruning=magnitude"],
    ],
    ids=lambda words: " ".join(words),
)
def test_every_kind_of_compression(lab, tmp_path, words):
    """Each leaves a model whose accuracy is measured, smaller by what was asked."""
    record = lab.run(*vision_words("vit", tmp_path), *words, "ratio=0.6")
    assert record["status"] == "done", record.get("reason")
    measured = record["metrics"]["top1"]
    assert measured["protocol"]["images"] == 4 * CLASSES
    assert 0 <= measured["value"] <= measured["top5"] <= 1
    assert record["components"].keys() >= {"TOP1", "IMAGES"}
    assert record["sizes"]["kv_cache_bytes_per_token"] is None


def test_top1_is_that_of_the_models_own_forward(lab, tmp_path):
    """On processed images, one by one; a compressed checkpoint measures the same again."""
    words = [*vision_words("dinov2", tmp_path), "method=svdllm", "ratio=0.5"]
    record = lab.run(*words, "save=true")
    model = AutoModelForImageClassification.from_pretrained(lab.root / record["checkpoint"]).eval()
    [cell] = lab.cells(*words)
    context = Context(cell, Record(cell, None), pick_device("cpu"))
    context.evaluator = "top1"
    images = context.evaluation_images()
    right = []
    for number, label in enumerate(images.labels):
        with torch.no_grad():
            pixels = context.processor(images=images.open(number), return_tensors="pt")["pixel_values"]
            right.append(model(pixel_values=pixels).logits.argmax().item() == label)
    measured = record["metrics"]["top1"]
    assert measured["value"] == sum(right) / len(right)
    assert measured["protocol"]["processor"]["size"] == {"height": 28, "width": 28}
    assert record["left_out"] == {} and "ppl" in cell.left_out
    again = lab.run(*words, f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["metrics"]["top1"] == measured


def test_data_of_another_kind_is_refused(lab, tmp_path):
    images = [word for word in vision_words("vit", tmp_path) if word.startswith("dataset")]
    with pytest.raises(UserError, match="reads images, and that data set has none"):
        lab.run("model.path=tiny:vit", "eval=[ppl,top1]")
    with pytest.raises(UserError, match="reads texts, and that data set has none"):
        lab.run(*images)
    record = lab.run("model.path=tiny:vit", "method=dense")
    assert record["status"] == "skipped" and "eval=ppl measures nothing" in record["reason"]


def test_more_classes_than_the_model_has(lab, tmp_path):
    words = vision_words("vit", tmp_path)
    for number in range(3):
        (tmp_path / "images" / "test" / f"more{number}").mkdir()
    last = next((tmp_path / "images" / "test" / "class0").iterdir())
    last.rename(tmp_path / "images" / "test" / "more2" / last.name)
    with pytest.raises(UserError, match="the data set has 13 classes and the model 10"):
        lab.run(*words, "method=dense")


def test_folders_give_their_classes_in_turn(tmp_path):
    images = ImageFolder(str(image_folder(tmp_path, train=2, test=1))).images("train", None)
    assert images.labels == [*range(CLASSES), *range(CLASSES)]
    assert images.first(3).labels == [0, 1, 2] and images.open(11).size == (20, 16)
    with pytest.raises(UserError, match="there is no folder"):
        ImageFolder(str(tmp_path)).images("validation", None)


def test_files_in_the_format_of_mnist(tmp_path):
    pixels = bytes(range(24))
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", (2, 3, 4), pixels)
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", (2,), bytes([7, 1]))
    images = IdxFiles(str(tmp_path), {"test": "t"}, "get it").images("test", None)
    assert images.labels == [7, 1]
    assert images.open(1).size == (4, 3) and images.open(1).convert("L").tobytes() == pixels[12:]
    with pytest.raises(UserError, match=r"there is no file .*; get it"):
        IdxFiles(str(tmp_path), {"train": "k"}, "get it").images("train", None)


def write_idx(file: Path, shape: tuple[int, ...], content: bytes) -> None:
    header = struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    file.write_bytes(gzip.compress(header + content))


def test_digits_for_calibration_and_evaluation_are_others(tmp_path, monkeypatch):
    """And the first so many are of all classes."""
    file = tmp_path / "mnist.csv.gz"
    rows = [[number // 250, number % 250, *[0] * 782, digit] for digit in range(10) for number in range(500)]
    file.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    monkeypatch.setattr(MnistOfMlxtend, "_file", classmethod(lambda cls: file))
    MnistOfMlxtend._digits.__func__.cache_clear()  # type: ignore[attr-defined]
    train, test = (MnistOfMlxtend().images(split, None) for split in ("train", "test"))
    assert (len(train.labels), len(test.labels)) == (4000, 1000)
    assert sorted(test.labels[:10]) == list(range(10))
    seen = {(label, images.open(i).tobytes()) for images in (train, test) for i, label in enumerate(images.labels)}
    assert len(seen) == 5000


def test_calibration_images_are_drawn_once_each():
    drawn = chosen_samples(50, 50, seed=1)
    assert sorted(drawn) == list(range(50)) and (chosen_samples(50, 50, seed=2) != drawn).any()


def test_an_onnx_file_gives_the_encoder_it_was_made_from(tmp_path):
    """As torch's exporter writes it: matrices without names, transposed, and the position embeddings in two."""
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
        num_labels=3,
    )
    model = Dinov2ForImageClassification(config).eval()
    (tmp_path / "model.onnx").write_bytes(exported(model))
    weights = onnx_conversion.encoder(tmp_path / "model.onnx")
    head = {f"classifier.{name}": tensor.detach() for name, tensor in model.classifier.named_parameters()}
    loaded = onnx_conversion.skeleton(tmp_path / "model.onnx", {**weights, **head})
    loaded.load_state_dict({**weights, **head}, assign=True)
    with torch.no_grad():
        assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
    (tmp_path / "broken.onnx").write_bytes(exported(model)[:-100])
    with pytest.raises(UserError, match="no ONNX file, or an incomplete one"):
        onnx_conversion.encoder(tmp_path / "broken.onnx")


def exported(model: Any) -> bytes:
    """What matters of an ONNX file of the encoder of ``model``."""
    graph = b""
    for name, value in model.dinov2.state_dict().items():
        if name.endswith("position_embeddings"):
            graph += tensor("onnx::Concat_1", value[:, :1]) + tensor("onnx::Reshape_2", value[:, 1:])
        elif name.startswith("encoder") and name.endswith("weight") and value.ndim == 2:
            product = f"/backbone/{name.removesuffix('.weight').replace('.', '/').replace('layer/', 'layer.')}"
            number = f"onnx::MatMul_{len(graph)}"
            reads = field(1, b"x") + field(1, number.encode())
            graph += tensor(number, value.T)
            graph += field(1, reads + field(2, f"{product}/MatMul_output_0".encode()) + field(4, b"MatMul"))
        elif not name.endswith("mask_token"):
            graph += tensor(f"backbone.{name}", value)
    return field(7, graph)


def tensor(name: str, value: torch.Tensor) -> bytes:
    shape = b"".join(b"\x08" + varint(size) for size in value.shape)
    content = shape + b"\x10\x01" + field(8, name.encode()) + field(9, value.contiguous().numpy().tobytes())
    return field(5, content)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def test_images_a_second_are_of_both_models_in_turns(lab, tmp_path):
    words = [*vision_words("vit", tmp_path), "method=svd", "ratio=0.5", "eval=[ppl,image_speed]"]
    small = ["eval.image_speed.batch_sizes=[4,1]", "eval.image_speed.repeats=3", "eval.image_speed.warmup=1"]
    record = lab.run(*words, *small)
    measured = record["metrics"]["image_speed"]
    assert [one["batch_size"] for one in measured["settings"]] == [4, 1]
    for one in measured["settings"]:
        assert one["ratio"]["q1"] <= one["ratio"]["median"] <= one["ratio"]["q3"]
        assert min(one[name]["images_per_second"] for name in ("model", "dense")) > 0
    assert measured["value"] == measured["settings"][0]["ratio"]["median"]
    assert measured["images_per_second"] == measured["settings"][0]["model"]["images_per_second"]
    assert measured["protocol"]["pixels"] == [3, 28, 28]
