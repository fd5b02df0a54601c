"""The code beside a checkpoint: where lowrank_lab is missing, it loads the same model, or nothing does."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lowrank_lab.checkpoints.checkpoint  # noqa: F401 - whose sources are taken
from lowrank_lab.checkpoints import bundle
from lowrank_lab.models import tiny
from lowrank_lab.modules.base import CompressedLinear, Described
from lowrank_lab.modules.factorized import FactorizedLinear, plain_linear

from .conftest import REPOSITORY, Lab

IDS = [[1, 80, 97, 120, 33, 55, 200, 41]]
# Between them they have every module that a cell saves.
CELLS = {
    "remapped": ("method=svd", "ratio=0.5", "storage=remap", "grouping=qkv"),
    "pruned": ("method=svd", "ratio=0.5", "pruning=magnitude", "sparsity=0.5"),
    "rotated": (
        "method=svd",
        "ratio=0.5",
        "grouping=kv",
        "quantization=quarot",
        "quantization/kv_cache=int4_rotated",
    ),
    "smoothed": ("method=dense", "pruning=magnitude", "sparsity=0.5", "quantization=smoothquant"),
}
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
def refused(load):
    try:
        load()
    except ValueError as error:
        return str(error)
found = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    texts = [one.generate(ids, max_new_tokens=4, do_sample=False).tolist() for one in (model, again)]
    found[folder] = {
        "texts": texts,
        "logits": model(ids).logits.tolist(),
        "refused": [refused(lambda: AutoModelForCausalLM.from_pretrained(folder + end)) for end in ("", "-again")],
        "refused by its class": refused(lambda: LlamaForCausalLM.from_pretrained(folder)),
    }
assert sys.modules.get("lowrank_lab") is None
print("\\n" + json.dumps(found))
"""


WITHOUT = "import sys; sys.modules['lowrank_lab'] = None\n"


def alone(python: str, folders: list[Path], cache: Path, before: str = "") -> dict[str, Any]:
    """What ``ALONE`` finds in ``folders``, in a process of its own outside of the repository."""
    command = [python, "-c", before + ALONE, json.dumps(IDS), *map(str, folders)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "PYTHONPATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cache.parent, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data_root: Path, artifacts: Path) -> dict[str, Path]:
    """The checkpoint of each of ``CELLS``."""
    lab = Lab(tmp_path_factory.mktemp("saved") / "results", data_root, artifacts)
    records = {
        name: lab.run(*overrides, "eval.ppl.max_windows=1", "save=true") for name, overrides in CELLS.items()
    }
    return {name: lab.root / record["checkpoint"] for name, record in records.items()}


def assert_the_same(folder: Path, found: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(torch.tensor(IDS)).logits)
    text = model.generate(torch.tensor(IDS), max_new_tokens=4, do_sample=False).tolist()
    assert found["texts"] == [text, text]
    assert all("trust_remote_code=True" in reason for reason in found["refused"])
    assert "no `quant_method`" in found["refused by its class"]


def test_transformers_alone_generates_the_same_text_or_refuses(saved, tmp_path):
    found = alone(sys.executable, list(saved.values()), tmp_path / "modules", WITHOUT)
    for folder in saved.values():
        assert_the_same(folder, found[str(folder)])


@pytest.mark.slow
def test_in_a_fresh_environment(saved, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    wanted = ["torch", "transformers", "safetensors"]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", *wanted], check=True
    )
    found = alone(python, list(saved.values()), tmp_path / "modules")
    for folder in saved.values():
        assert_the_same(folder, found[str(folder)])


LM_EVAL = """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=1)
request = Instance("loglikelihood", {}, ("the low rank", " of a matrix"), 0)
print(model.loglikelihood([request])[0][0])
"""


@pytest.mark.slow
def test_lm_eval_reads_it(saved, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT + LM_EVAL, str(saved["remapped"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(saved["remapped"]),
        AutoTokenizer.from_pretrained(saved["remapped"]),
    )
    context, whole = (
        tokenizer(text, return_tensors="pt").input_ids for text in ("the low rank", "the low rank of a matrix")
    )
    with torch.no_grad():
        logs = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])
    assert float(done.stdout.split()[-1]) == pytest.approx(float(logs[context.shape[1] - 1 :].sum()), rel=1e-4)


OWN_CODE = {
    "configuration_mine.py": """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
""",
}
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


@pytest.mark.slow
def test_a_model_with_code_of_its_own(lab, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    tiny.build("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in OWN_CODE.items():
        (folder / name).write_text(text)
    record = lab.run(f"model.path={folder}", "model.trust_remote_code=true", "method=svd", "save=true")
    saved = lab.root / record["checkpoint"]
    found = alone(sys.executable, [saved], tmp_path / "modules", WITHOUT)[str(saved)]
    assert found["texts"][0] == found["texts"][1]
    assert all("trust_remote_code=True" in reason for reason in found["refused"])
    again = lab.run(f"model.path={saved}", "model.trust_remote_code=true")
    assert again["metrics"]["ppl"]["value"] == record["metrics"]["ppl"]["value"]
    assert again["sizes"] == record["sizes"]


def test_no_code_of_a_folder_runs_in_our_name(tmp_path):
    """What names our type of model is read by us, who are not asked whether code of the folder may run."""
    quantization = {"original_model_type": "mine", "original_auto_map": AUTO_MAP}
    config = {"model_type": "lowrank_lab", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="transformers does not know the compressed model's type 'mine'"):
        AutoConfig.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def kinds() -> list[type[Described]]:
    """All kinds of modules that lowrank_lab itself defines."""
    found = {kind for base in Described.__subclasses__() for kind in base.kinds.values()}
    return sorted(
        (kind for kind in found if kind.__module__.startswith("lowrank_lab.")), key=lambda kind: kind.kind
    )


def test_the_code_of_all_kinds_needs_nothing_else():
    names = [(kind.__module__, kind.__qualname__) for kind in kinds()]
    tree = ast.parse(bundle.bundle([bundle.LOADER, *names], "AutoModel"))
    imported = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    assert {kind.__name__ for kind in kinds()} <= {
        node.name for node in tree.body if isinstance(node, ast.ClassDef)
    }


def test_a_checkpoint_has_no_code_that_it_does_not_use(saved):
    code = {name: (folder / "modeling_lowrank_lab.py").read_text() for name, folder in saved.items()}
    assert "class MixedLinear" in code["remapped"]
    for unused in ("class QuantizedLinear", "class RoundedCache", "class Hadamard", "class SparseLinear"):
        assert unused not in code["remapped"]


class Halved(CompressedLinear):
    """From outside of lowrank_lab: a FactorizedLinear with a factor."""

    kind = "tests.halved"

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = FactorizedLinear(linear, plain_linear(torch.ones(2, 2), None))


def test_the_class_of_a_module_from_outside_is_taken_along():
    model = nn.Sequential(Halved(nn.Linear(2, 2)))
    code = bundle.code_of(model)
    assert code is not None
    assert "class Halved(CompressedLinear):" in code
    assert "class FactorizedLinear(CompressedLinear):" in code
    assert "import pytest" not in code


def test_a_class_within_a_function_is_not(caplog):
    class Local(CompressedLinear):
        kind = "tests.local"

    caplog.set_level(logging.WARNING)
    assert bundle.code_of(nn.Sequential(Local())) is None
    assert "can be loaded only where lowrank_lab is installed" in caplog.text
