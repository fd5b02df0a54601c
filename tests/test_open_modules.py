"""A storage and a compressed linear from outside the package: what the package asks of them, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.modules.base import CompressedLinear, Counts, Replacement, bias_of, dense_weight, nbytes
from lowrank_lab.modules.rebuild import check_description
from lowrank_lab.modules.site import Site
from lowrank_lab.reporting import tables

from .conftest import Lab

IDS = torch.tensor([[1, 80, 97, 120, 33, 55, 200, 41]])


class ScaledLinear(CompressedLinear):
    """U diag(σ) Vᵀ with U (out, k) and Vᵀ (k, in) in bfloat16 and σ (k,) in float32."""

    kind = "tests.scaled"

    def __init__(self, u: Tensor, sigma: Tensor, vt: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.u, self.sigma, self.vt = (nn.Parameter(part, requires_grad=False) for part in (u, sigma, vt))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> ScaledLinear:
        (out, inp), rank = dense_weight(replaced).shape, description["rank"]
        shapes = {(out, rank): torch.bfloat16, (rank,): torch.float32, (rank, inp): torch.bfloat16}
        parts = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes.items()]
        return cls(*parts, bias_of(replaced))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @property
    def rank(self) -> int:
        return len(self.sigma)

    def counts(self) -> Counts:
        products = Counts.of_weights(self.u, self.vt)
        return products + Counts(parameters=self.rank, bytes=nbytes(self.sigma), weights=(self.sigma,))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.u.float() * self.sigma, self.vt

    def dense_weight(self) -> Tensor:
        return (self.u.float() * self.sigma) @ self.vt.float()

    def forward(self, x: Tensor) -> Tensor:
        latent = nn.functional.linear(x, self.vt.to(x.dtype)) * self.sigma.to(x.dtype)
        return nn.functional.linear(latent, self.u.to(x.dtype), self.bias)


class Scaled:
    """Every member of a site by itself, as a ScaledLinear: k (out + in) words of 16 bits and two for each σ."""

    counts = "16-bit words"

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * (out + inp + 2)

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        [name] = site.members
        vt = right / singular_values.unsqueeze(-1)
        parts = left.to(torch.bfloat16), singular_values.float(), vt.to(torch.bfloat16)
        block.set_submodule(name, ScaledLinear(*parts, bias_of(block.get_submodule(name))))


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that a user adds to a run: a folder with ``storage=scaled``."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "storage").mkdir()
    (folder / "storage" / "scaled.yaml").write_text("_target_: tests.test_open_modules.Scaled\n")
    return f"hydra.searchpath=[file://{folder}]"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_root: Path, conf: str) -> tuple[Lab, dict[str, Any]]:
    """A cell with that storage, with all that a cell can do with it."""
    lab = Lab(tmp_path_factory.mktemp("open") / "results", data_root)
    evaluators = ("eval=[ppl,factors,output_error]", "save=true", "save.merge=true")
    record = lab.run(conf, "method=svd", "ratio=0.6", "storage=scaled", *evaluators)
    assert record["status"] == "done"
    return lab, record


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def test_it_is_counted_as_it_says(saved):
    lab, record = saved
    sizes, ranks = record["sizes"], record["compressions"]["lowrank"]["plan"]
    dense = lab.run("method=dense")["sizes"]
    merged = AutoModelForCausalLM.from_pretrained(lab.root / record["merged_checkpoint"])
    shapes = {name: merged.get_submodule(name).weight.shape for name in ranks}
    sums, numbers = ({name: of(shapes[name]) for name in ranks} for of in (sum, math.prod))
    assert any(rank is not None for rank in ranks.values())
    weights = {name: numbers[name] if k is None else k * sums[name] for name, k in ranks.items()}
    factored = [k for k in ranks.values() if k is not None]
    assert sizes["sites"]["parameters"] == sum(weights.values()) + sum(factored)
    assert sizes["parameters"] == dense["parameters"] - sum(numbers.values()) + sizes["sites"]["parameters"]
    assert sizes["macs_per_token"] == dense["macs_per_token"] - sum(numbers.values()) + sum(weights.values())
    assert sizes["sites"]["bytes"] == sum(
        4 * numbers[name] if k is None else 2 * weights[name] + 4 * k for name, k in ranks.items()
    )
    words = sum(numbers[name] if k is None else k * (sums[name] + 2) for name, k in ranks.items())
    assert sizes["ratio_reached"] == words / sum(numbers.values()) <= 0.6


def test_it_is_loaded_merged_and_evaluated_again(saved):
    lab, record = saved
    folder = lab.root / record["checkpoint"]
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    linear = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(linear, ScaledLinear)
    assert (linear.u.dtype, linear.sigma.dtype) == (torch.bfloat16, torch.float32)
    again = lab.run(f"model.path={folder}")
    assert again["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]
    assert again["sizes"] == record["sizes"]
    expected = logits(loaded)
    merged = AutoModelForCausalLM.from_pretrained(lab.root / record["merged_checkpoint"])
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(loaded.dequantize()), logits(merged))


def test_it_has_a_row_in_the_table(saved):
    _, record = saved
    [row] = tables.comparison([record]).to_dict("records")
    assert row["value"] == record["metrics"]["ppl"]["value"]


def test_its_errors_and_factors_are_measured(saved):
    _, record = saved
    ranks = record["compressions"]["lowrank"]["plan"]
    errors = record["metrics"]["output_error"]["linears"]
    for name, of_blocks in errors.items():
        found = [error is not None for error in of_blocks]
        assert found == [ranks[f"model.layers.{block}.{name}"] is not None for block in range(3)]
    factored = {one["linear"] for one in record["metrics"]["factors"]["linears"]}
    assert factored <= {"self_attn.q_proj", "mlp.gate_proj"}
    assert factored


def test_a_quantization_skips_what_it_cannot_round(lab, conf):
    record = lab.run(conf, "method=svd", "ratio=0.6", "storage=scaled", "quantization=int8")
    assert record["status"] == "skipped"
    assert "linears of kind 'tests.scaled' cannot be quantized" in record["reason"]


def test_an_unknown_kind_is_one_line(saved, lab, tmp_path):
    shutil.copytree(saved[0].root / saved[1]["checkpoint"], tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(file.read_text().replace("tests.scaled", "nobody.knows"))
    message = "kind 'nobody.knows', which lowrank_lab does not know; import the package that defines it"
    with pytest.raises(UserError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_two_classes_of_one_kind_clash():
    with pytest.raises(TypeError, match=r"the kind 'tests\.scaled' is ScaledLinear's already"):

        class Another(CompressedLinear):
            kind = "tests.scaled"

    assert Replacement.of_kind("tests.scaled") is ScaledLinear


def test_a_description_of_something_else_is_noticed():
    class Wrong(ScaledLinear):
        kind = "tests.wrong"

        def describe(self) -> dict[str, Any]:
            return {"rank": self.rank + 1}

    parts = torch.ones(6, 2, dtype=torch.bfloat16), torch.ones(2), torch.ones(2, 4, dtype=torch.bfloat16)
    check_description(ScaledLinear(*parts, None), torch.empty(6, 4, device="meta"))
    with pytest.raises(ValueError, match="a Wrong has 22 parameters, but the one that it describes has 33"):
        check_description(Wrong(*parts, None), torch.empty(6, 4, device="meta"))


# Checkpoints of versions 1 to 3, whose config.json and tensors' names the version of that time wrote.

OLD = sorted((Path(__file__).parent / "old_checkpoints").glob("*.json"))


def old_checkpoint(folder: Path, old: Path, version: int) -> dict[str, Any]:
    """A folder as that version wrote it, with zeros for weights; returns its tensors' dtypes and shapes."""
    content = json.loads(old.read_text())
    quantization = content["config"]["quantization_config"]
    quantization["version"] = version
    for name in {1: ("quantized", "steps", "final", "kv_cache"), 2: ("steps", "final", "kv_cache"), 3: ()}[version]:
        del quantization[name]
    tensors = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in content["tensors"].items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content["config"]))
    return content["tensors"]


def versions() -> list[Any]:
    with_less = {"uv": (1, 2, 3), "remap_qkv": (1, 2, 3), "int4": (2, 3)}
    return [(old, version) for old in OLD for version in with_less.get(old.stem, (3,))]


@pytest.mark.parametrize(("old", "version"), versions(), ids=lambda value: getattr(value, "stem", value))
def test_old_checkpoints_are_still_read(tmp_path, old, version):
    tensors = old_checkpoint(tmp_path, old, version)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    found = {
        name: [str(parameter.dtype).removeprefix("torch."), list(parameter.shape)]
        for name, parameter in loaded.named_parameters()
    }
    assert found == tensors
    saved = loaded.config.quantization_config.saved
    assert type(saved).from_dict(json.loads(json.dumps(saved.to_dict()))).to_dict() == saved.to_dict()
    assert (saved.is_quantized, saved.online) == {
        "uv": (False, False),
        "remap_qkv": (False, False),
        "int4": (True, False),
        "kv4": (True, True),
        "quarot": (True, True),
        "qsvd_w4a4": (True, True),
    }[old.stem]
