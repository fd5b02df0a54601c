"""Tokens of images that are merged: which, into what, what attention and pooling make of it, and what it costs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.evaluation.macs import counter
from lowrank_lab.models.tasks.image_classification import IMAGE_CLASSIFICATION as TASK
from lowrank_lab.models.vision_families import VISION_FAMILIES
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.image_macs import macs_of_image
from lowrank_lab.modules.token_merging import Tokens, attend_to_merged, attending, merge_tokens, places_of
from lowrank_lab.records.results import other_compressions
from lowrank_lab.reporting import published, tables
from lowrank_lab.reporting.joined import dicts
from lowrank_lab.reporting.matching import is_cell, method_of
from lowrank_lab.reporting.measured import numbers
from lowrank_lab.tokens.tome import ToMe
from tests.images import vision_words

GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randn(3, 3, 28, 28, generator=GENERATOR)
POSITIONS = {
    "vit": 17,
    "deit": 18,
    "dinov2": 17,
    "clip": 17,
    "siglip": 16,
}  # 16 patches and the family's own tokens


@pytest.fixture(scope="module")
def dense(vision_folders: dict[str, Path]) -> dict[str, Any]:
    """A model of every family."""
    return {family: TASK.load(str(folder), None, "float32", False) for family, folder in vision_folders.items()}


@pytest.fixture(params=VISION_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, dense: dict[str, Any]) -> Any:
    return copy.deepcopy(dense[family])


def logits(model: nn.Module, pixels: Tensor = PIXELS) -> Tensor:
    with torch.no_grad():
        return TASK.logits(model, {"pixel_values": pixels})


def by_the_paper(keys: Tensor, own: int, r: int) -> list[set[int]]:
    """The groups of tokens of one image after one merging, pair by pair, in their order (ToMe, §3)."""
    similarity = lambda a, b: float(torch.cosine_similarity(keys[a], keys[b], dim=0))
    count = len(keys)
    set_a, set_b = range(0, count, 2), range(1, count, 2)
    edges = [max((similarity(a, b), -b, a) for b in set_b if b >= own) for a in set_a if a >= own]
    groups = {token: {token} for token in range(count)}
    for _, minus_b, a in sorted(edges, reverse=True)[:r]:
        groups[-minus_b] |= groups.pop(a)
    order = [*range(own), *(a for a in set_a if a >= own), *(b for b in set_b if b >= own)]
    return [groups[token] for token in order if token in groups]


@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize(("count", "r"), [(17, 0), (17, 1), (17, 5), (18, 8), (16, 7), (4, 1)])
def test_which_tokens_are_merged(own, count, r):
    r = min(r, (count - own) // 2)
    keys = torch.randn(4, count, 6, generator=GENERATOR)
    places = places_of(keys, r, own)
    for of_image, places_of_image in zip(keys, places.tolist(), strict=True):
        groups = [{t for t, place in enumerate(places_of_image) if place == p} for p in range(count - r)]
        assert groups == by_the_paper(of_image, own, r)
        assert groups[:own] == [{token} for token in range(own)]


def test_merging_keeps_the_sum_by_size():
    states = torch.randn(2, 9, 5, generator=GENERATOR)
    tokens, whole = Tokens.of(states), states.sum(1)
    merged = states
    for r in (3, 2, 1):
        places = places_of(torch.randn(2, merged.shape[1], 4, generator=GENERATOR), r, 1)
        merged, tokens = tokens.merge(merged, places, merged.shape[1] - r)
        torch.testing.assert_close((merged * tokens.sizes[..., None]).sum(1), whole)
        assert (tokens.sizes.sum(1) == 9).all() and (tokens.sizes[:, 0] == 1).all()
    restored = tokens.restored(merged)
    torch.testing.assert_close(restored.sum(1), whole)
    for image in range(2):
        for place in range(3):
            members = tokens.source[image] == place
            assert members.sum() == tokens.sizes[image, place]
            torch.testing.assert_close(
                restored[image, members], states[image, members].mean(0).expand(members.sum(), -1)
            )


def test_attention_counts_a_token_as_often_as_it_has_patches():
    """Equal tokens and one token of their size give every query the same (Eq. 1)."""
    query, key, value = (torch.randn(2, 4, 5, 8, generator=GENERATOR) for _ in range(3))
    sizes = torch.tensor([1, 3, 1, 2, 5])
    attend = lambda _module, q, k, v, mask, **_: (scaled_dot_product_attention(q, k, v, mask), None)
    repeated = [tensor.repeat_interleave(sizes, 2) for tensor in (key, value)]
    expected, _ = attend(None, query, *repeated, None)
    with attending(sizes.float().log().expand(2, 5)[:, None, None]) as attended:
        found, _ = attend_to_merged(attend, None, query, key, value, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attended.keys, key.mean(1))
    unweighted, _ = attend_to_merged(attend, None, query, key, value, None)
    assert (unweighted - expected).abs().max() > 0.05


def test_no_merging_gives_the_dense_logits(model):
    expected = logits(model)
    merge_tokens(model, VISION_FAMILIES[model.config.model_type].tower, [0, 0, 0], True)
    assert torch.equal(logits(model), expected)


def of_equal_patches(model: Any) -> Any:
    """The model without what tells one patch of an image of one colour from another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.zero_()
    return model


def test_equal_patches_are_merged_without_loss(model, family):
    """Of an image of one colour all patches are equal, so that any pairs may be merged; pooling must weigh them."""
    model, pixels = of_equal_patches(model), torch.full((1, 3, 28, 28), 0.3)
    expected = logits(model, pixels)
    without = copy.deepcopy(model)
    merge_tokens(model, VISION_FAMILIES[family].tower, [3, 3, 3], True)
    torch.testing.assert_close(logits(model, pixels), expected, atol=1e-5, rtol=1e-5)
    merge_tokens(without, VISION_FAMILIES[family].tower, [3, 3, 3], False)
    difference = (logits(without, pixels) - expected).abs().max()
    if VISION_FAMILIES[family].tower.own_tokens:  # the class token then sees fewer patches
        assert difference > 1e-5
    else:
        assert difference < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_tokens_and_macs_of_every_block(model, family, implementation):
    """As they run, by torch's counter; never more than half of the patches are merged."""
    row, image = VISION_FAMILIES[family], PIXELS[:1]
    model.set_attn_implementation(implementation)
    skeleton = lambda: TASK.skeleton(model.config, False)
    of_dense = macs_of_image(model, skeleton(), row, TASK, image)
    assert of_dense["tokens"] == [POSITIONS[family]] * 4 and of_dense["macs"] == of_dense["macs_dense"]
    merge_tokens(model, row.tower, [3, 100, 0], True)
    attended: list[int] = []
    kept: list[int] = []
    for block in blocks_of(model, row.tower):
        note = lambda to: lambda _module, args: to.append(args[0].shape[1])
        block.get_submodule(row.tower.attention.key).register_forward_pre_hook(note(attended))
        block.get_submodule("mlp").register_forward_pre_hook(note(kept))
    with counter() as counted:
        logits(model, image)
    sizes = macs_of_image(model, skeleton(), row, TASK, image)
    assert sizes["tokens"] == [*attended, kept[-1]] and attended[1:] == kept[:-1]
    patches = attended[1] - row.tower.own_tokens
    assert attended == [POSITIONS[family], POSITIONS[family] - 3, attended[1] - patches // 2]
    assert sizes["macs"] == counted.get_total_flops() // 2 < sizes["macs_dense"] == of_dense["macs"]


def test_macs_of_deit_small_are_the_published_ones():
    """4.6 GFLOPs, of a multiply-add each, and 2.7 with r = 13 in each of 12 blocks: the slides' 41.30 % less."""
    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        num_labels=1000,
        image_size=224,
        patch_size=16,
    )
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    row = VISION_FAMILIES["vit"]
    merge_tokens(model, row.tower, [13] * 12, True)
    sizes = macs_of_image(model, TASK.skeleton(config, False), row, TASK, torch.empty(1, 3, 224, 224))
    assert sizes["tokens"] == [197 - 13 * block for block in range(13)]
    published = round(sizes["macs_dense"] / 1e9, 1), round(sizes["macs"] / 1e9, 1)
    assert published == (4.6, 2.7) and round(100 * (1 - 2.7 / 4.6), 1) == 41.3
    assert 100 * (1 - sizes["macs"] / sizes["macs_dense"]) == pytest.approx(41.16, abs=0.005)  # not of rounded ones


def test_schedules():
    """The decreasing one merges as many in all, and none in the last block."""
    assert ToMe(4, "constant", True).schedule_of(3) == [4, 4, 4]
    assert ToMe(4, "decreasing", True).schedule_of(5) == [8, 6, 4, 2, 0]
    assert ToMe(4, "decreasing", True).schedule_of(1) == [4]


def test_states_from_elsewhere_are_refused(dense):
    """A block that does not know what its tokens are would weigh them wrongly."""
    model = copy.deepcopy(dense["vit"])
    merge_tokens(model, VISION_FAMILIES["vit"].tower, [2, 2, 2], True)
    with pytest.raises(RuntimeError, match="another block than the next"):
        blocks_of(model, VISION_FAMILIES["vit"].tower)[1](torch.randn(1, 15, 48))


@pytest.mark.parametrize(
    "words", [pytest.param("svdllm", marks=pytest.mark.slow), "comcat quantization=int8 pruning=magnitude"]
)
def test_it_follows_other_compressions_and_is_saved(lab, tmp_path, monkeypatch, words):
    method, *others = words.split()
    seen, save = [], checkpoint.save

    def look_and_save(folder: Path, model: nn.Module, *rest: object) -> None:
        seen.append(logits(model))
        save(folder, model, *rest)

    monkeypatch.setattr(checkpoint, "save", look_and_save)
    asked = [*vision_words("dinov2", tmp_path), f"method={method}", "ratio=0.6", *others]
    plain = lab.run(*asked)
    record = lab.run(*asked, "tokens=tome", "tokens.r=3", "tokens.schedule=decreasing", "save=true")
    assert list(record["compressions"]) == [*plain["compressions"], "tokens"]
    assert list(record["compressions"]["tokens"]["plan"].values()) == [6, 3, 0]
    assert other_compressions(record).endswith("ToMe r=3 decreasing")
    image, before = record["sizes"].pop("image"), plain["sizes"].pop("image")
    assert image["tokens"] == [17, 11, 8, 8] and before["tokens"] == [17] * 4
    assert image["macs"] < before["macs"] < before["macs_dense"] == image["macs_dense"]
    assert record["sizes"] == plain["sizes"]
    loaded = AutoModelForImageClassification.from_pretrained(lab.root / record["checkpoint"])
    torch.testing.assert_close(logits(loaded), seen[0], rtol=0, atol=1e-6)
    again = [
        *asked,
        f"model.path={lab.root / record['checkpoint']}",
        "method=dense",
        "pruning=none",
        "quantization=none",
    ]
    measured = lab.run(*again)
    assert measured["sizes"]["image"] == image
    assert measured["metrics"]["top1"] == record["metrics"]["top1"]
    with pytest.raises(UserError, match="merges tokens already"):
        lab.cells(*again, "tokens=tome")
    with pytest.raises(UserError, match="or merges tokens"):
        lab.cells(*again, "quantization=int4")
    text = tables.markdown(lab.results.records())
    kept = f"{image['macs'] / image['macs_dense']:.4f}"
    [line] = [line for line in text.splitlines() if "tokens=ToMe r=3 decreasing" in line]
    assert "MACs kept" in text and f"| {kept} " in " ".join(line.split())


def test_a_published_row_of_it_is_that_of_the_dense_model_with_merged_tokens(lab, tmp_path):
    table = published.load("slides/comcat")
    rows = {row["method"]: row for row in dicts(table.rows) if row["metric"] == "flops_removed"}
    dense, merged = (
        lab.run(*vision_words("vit", tmp_path), *words)
        for words in (["method=dense"], ["method=dense", "tokens=tome"])
    )
    assert [method_of(record) for record in (dense, merged)] == ["dense", "tome"]
    assert is_cell(rows["tome"], merged, table) and not is_cell(rows["tome"], dense, table)
    assert is_cell(rows["dense"], dense, table) and not is_cell(rows["dense"], merged, table)
    image = merged["sizes"]["image"]
    [removed] = [value for (metric, _, _, value), _ in numbers(merged) if metric == "flops_removed"]
    assert removed == pytest.approx(100 - 100 * image["macs"] / image["macs_dense"]) and removed > 20


def test_what_makes_no_sense_is_told(lab, tmp_path):
    record = lab.run("method=dense", "tokens=tome")
    assert record["status"] == "skipped" and "merges tokens of images" in record["reason"]
    assert record["label"] == "dense ToMe r=4 tiny-llama wikitext2"
    with pytest.raises(UserError, match=r"^tokens: r=-1"):
        lab.cells("tokens=tome", "tokens.r=-1")
    with pytest.raises(UserError, match="dense weights cannot hold ToMe r=4"):
        lab.cells(*vision_words("vit", tmp_path), "tokens=tome", "save.merge=true")


def test_a_cell_without_it_has_the_key_that_it_had(lab, tmp_path):
    words = [*vision_words("vit", tmp_path), "method=svdllm"]
    [plain], [none], [merged] = (lab.cells(*words, *more) for more in ([], ["tokens=none"], ["tokens=tome"]))
    assert plain.key == none.key != merged.key
    assert "tokens" not in plain.compressions
    [other] = lab.cells(*words, "tokens=tome", "tokens.proportional_attention=false")
    assert other.key != merged.key
    assert other.label != merged.label
