"""What is held in memory: mapped weights, one block on the device, hidden states in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank_lab.models import walk as walking
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.walk import blocks_of, on_device, walk

pytestmark = pytest.mark.own_artifacts

CPU = torch.device("cpu")
LLAMA = FAMILIES["llama"].tower
MAPS = Path("/proc/self/maps")


def mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether ``tensor`` is mapped from a file in ``folder``, by the system's own account (Linux)."""
    for line in MAPS.read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(last, 16):
            return str(folder) in line
    return False


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
def test_weights_are_mapped_from_the_checkpoint_in_its_own_dtype(checkpoints):
    """transformers does it; nothing here would notice if it ceased to, but for the memory."""
    for dtype, expected in (("float32", True), ("bfloat16", False)):
        model = load_model(str(checkpoints["llama"]), None, dtype, False)
        assert {mapped(parameter, checkpoints["llama"]) for parameter in model.parameters()} == {expected}


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hidden_states_in_files_are_the_same_and_leave_nothing(family, checkpoints, tmp_path):
    """Also those of earlier blocks, which some callers hold on to."""
    model, tower = load_model(str(checkpoints[family]), None, "float32", False), FAMILIES[family].tower
    batches = torch.randint(4, 260, (5, 40), generator=torch.Generator().manual_seed(1)).split(2)

    def all_states(offload: Path | None) -> list[Tensor]:
        found, hidden = [], []
        for _, _, run in walk(model, tower, batches, CPU, hidden, offload):
            found += hidden
            run()
        return found + hidden

    in_memory, in_files = all_states(None), all_states(tmp_path)
    assert len(in_files) == (len(blocks_of(model, tower)) + 1) * len(batches)
    assert all(mapped(states, tmp_path) for states in in_files)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(one, other) for one, other in zip(in_memory, in_files, strict=True))


def test_offloading_is_a_setting_that_changes_no_key_and_no_number(lab, monkeypatch):
    """Of a method that walks three times: for statistics, for an update, and for GPTQ."""
    words = ("method=svdllm_u", "quantization=gptq", "ratio=0.6")
    expected, kept = lab.run(*words), []
    offloaded = walking.offloaded
    monkeypatch.setattr(
        walking, "offloaded", lambda states, folder: kept.append(folder) or offloaded(states, folder)
    )
    again = [*words, "calibration.offload=true", f"artifacts={lab.root / 'scratch'}"]
    [cell] = lab.cells(*again)
    assert cell.key == expected["key"]
    lab.results.path(cell.key).unlink()
    found = lab.run(*again)
    assert found["metrics"] == expected["metrics"]
    walks, depths, batches = 3, 4, 3
    assert kept == [lab.root / "scratch"] * (walks * depths * batches)


def test_a_block_that_was_not_changed_on_the_device_comes_back_without_a_copy(checkpoints, monkeypatch):
    """On a device that is a copy in memory."""
    copied = lambda block, device: block if device == CPU else block._apply(lambda tensor: tensor.clone())
    monkeypatch.setattr(nn.Module, "to", copied)
    block = blocks_of(load_model(str(checkpoints["llama"]), None, "float32", False), LLAMA)[0]
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in block.named_parameters()}
    with torch.no_grad(), on_device(block, torch.device("cuda")):
        assert all(parameter.data_ptr() != before[name][0] for name, parameter in block.named_parameters())
        block.self_attn.q_proj.weight.mul_(2)
        block.self_attn.k_proj.weight.data = block.self_attn.k_proj.weight * 3
        block.mlp.up_proj = nn.Linear(48, 80, bias=False)
        replaced = block.mlp.up_proj.weight.clone()
    changed = {"self_attn.q_proj.weight": 2, "self_attn.k_proj.weight": 3}
    for name, parameter in block.named_parameters():
        address, value = before[name]
        if name == "mlp.up_proj.weight":
            assert torch.equal(parameter, replaced)
        elif name in changed:
            assert torch.equal(parameter, changed[name] * value)
        else:
            assert parameter.data_ptr() == address, name
