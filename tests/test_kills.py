"""kill -9 in every stage of a cell: the same command gives the numbers of an undisturbed run and leaves nothing.

A few of the stages are quick to test, the others are marked slow.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowrank_lab.running import training

from .conftest import REPOSITORY, Lab

pytestmark = pytest.mark.own_artifacts

LORA = ["method=svdllm_lora", "refinement.samples=4", "refinement.seqlen=16", "refinement.epochs=1"]
DISTILL = ["method=svdllm", "refinement=distill", *LORA[1:]]
TRAINED = ["method=dobi_noremap", "allocation.steps=3", "ratio=0.55"]


def at(overrides: str | list[str], where: str, call: int = 1, after: bool = True, of: str = "") -> dict[str, Any]:
    words = overrides.split() if isinstance(overrides, str) else overrides
    return {"overrides": words, "at": where, "call": call, "after": after, "of": of}


QUICK = {
    "hidden states in files": at(
        "method=svdllm calibration.offload=true", "lowrank_lab.models.walk:mmap.mmap", call=3, after=False
    ),
    "allocation training": at(TRAINED, "torch:save", call=2),
    "a record": at("method=svdllm", "os:replace", after=False, of="/records/"),
}
SLOW = {
    "decomposition": at("method=svdllm", "lowrank_lab.lowrank.spectra:save_file", call=2),
    "refinement": at("method=svdllm_u", "lowrank_lab.lowrank.factors:save_factors", call=2),
    "a checkpoint": at("method=svdllm save=true", "lowrank_lab.checkpoints.checkpoint:save"),
    "evaluation": at(
        "method=svdllm ratio=0.7 eval.ppl.batch_size=2", "lowrank_lab.evaluation.perplexity:check_output", call=2
    ),
    "statistics": at("method=svdllm", "lowrank_lab.calibration.statistics:save_file", call=2),
    "model conversion": at("method=svd", "lowrank_lab.models.tiny:byte_tokenizer"),
    "calibration tokens": at("method=svdllm", "lowrank_lab.calibration.tokens:save_file"),
    "gradients": at("method=fwsvd", "lowrank_lab.calibration.gradients:save_file", call=2),
    "renaming an artifact": at("method=svdllm", "os:replace", after=False, of="/spectra/"),
    "sensitivities": at("method=asvd", "lowrank_lab.lowrank.allocation.strs:write_json", call=2),
    "factorization": at("method=svdllm", "lowrank_lab.lowrank.storage.absorb:Absorb.install", call=3),
    "quantization": at(
        "method=svdllm quantization=gptq", "lowrank_lab.quantization.method.gptq:Gptq.quantize", call=3
    ),
    "a metric": at("method=svdllm", "os:replace", after=False, of="/metric/"),
    "LoRA": at(LORA, "torch:save", call=2),
    "distillation": at(DISTILL, "torch:save"),
    "parameters beside the factors": at(DISTILL, "os:replace", after=False, of="/parameters.safetensors"),
    "renaming the factors": at(LORA, "os:replace", after=False, of="/factors/"),
    "weighted descent": at("method=wsvd", "lowrank_lab.lowrank.factors:save_factors", call=2),
    "incremental PCA": at(
        "method=dobi_ipca allocation.steps=4", "lowrank_lab.lowrank.factors:save_factors", call=2
    ),
    "weight gradients": at("method=wsvd", "lowrank_lab.calibration.gradients:save_file", call=3),
    "learned rotation": at("method=dense quantization=spinquant", "torch:save", call=2),
    "generation": at("method=svd eval=generation,ppl", "lowrank_lab.evaluation.perplexity:check_output"),
    "a merged checkpoint": at(
        "method=svd save.merge=true save=true", "lowrank_lab.checkpoints.checkpoint:save", call=2
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Any:
    """The record of some overrides, run once without being killed."""
    lab, known = Lab(tmp_path_factory.mktemp("undisturbed"), data_root), {}

    def record(overrides: list[str]) -> dict[str, Any]:
        words = tuple(overrides)
        if words not in known:
            known[words] = lab.run(*overrides)
        return known[words]

    return record


def kill(root: Path, data_root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Lab]:
    """A lab of each case in which it has been killed."""
    labs = {name: Lab(root / name.replace(" ", "-") / "results", data_root) for name in cases}
    sent = [{**case, "overrides": labs[name].overrides(*case["overrides"])} for name, case in cases.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed"],
        input=json.dumps(sent),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert dict(zip(cases, statuses, strict=True)) == dict.fromkeys(cases, -9), done.stderr
    return labs


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> dict[str, Lab]:
    return kill(tmp_path_factory.mktemp("killed"), data_root, QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> dict[str, Lab]:
    return kill(tmp_path_factory.mktemp("killed"), data_root, SLOW)


@pytest.mark.parametrize("stage", QUICK)
def test_a_cell_killed_in(quick, undisturbed, stage):
    goes_on(quick[stage], QUICK[stage]["overrides"], undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", SLOW)
def test_a_cell_killed_in_the_longer(slow, undisturbed, stage):
    goes_on(slow[stage], SLOW[stage]["overrides"], undisturbed)


def goes_on(lab: Lab, overrides: list[str], undisturbed: Any) -> None:
    assert lab.results.records() == []
    record, expected = lab.run(*overrides), undisturbed(overrides)
    assert record["status"] == "done"
    for what in ("key", "metrics", "sizes", "compressions", "checkpoint", "merged_checkpoint"):
        assert record.get(what) == expected.get(what), what
    unfinished = re.compile(r".*\.tmp.*|.*\.partial|.*\.state|\.hidden-states.*")
    left = [file for file in lab.root.rglob("*") if unfinished.fullmatch(file.name)]
    assert [file for file in left if "/factors/" not in str(file) and "/ranks/" not in str(file)] == []
    assert list((lab.root / "running").iterdir()) == []


def test_a_state_of_a_training_that_cannot_be_read_is_begun_anew(undisturbed, lab, monkeypatch, caplog):
    """As after a power cut, which may leave files without what was written last."""
    stop = RuntimeError("stopped")
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    save = training._save

    def cut(state: Path, *arguments: Any) -> None:
        save(state, *arguments)
        state.write_bytes(state.read_bytes()[:100])
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", cut)
        with pytest.raises(RuntimeError, match="stopped"):
            lab.run(*TRAINED)
    assert lab.run(*TRAINED)["metrics"] == undisturbed(TRAINED)["metrics"]
    assert "cannot be read" in caplog.text
