"""How a record describes its cell to tables, in new records and in those that older versions have written."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_lab.cells import config
from lowrank_lab.records import old
from lowrank_lab.records.labels import labels
from lowrank_lab.records.results import Results

from .test_faults import OLD

COMMANDS = (
    "method=dense",
    "method=svdllm_lora",
    "method=dobi",
    "method=qsvd targets.blocks=[-1]",
    "method=asvd_kv",
    "method=dense quantization=int4 targets=kv",
    "method=svdllm quantization=w4a4 quantization.left.bits=3",
    "method=dense quantization=quarot seed=1",
    "method=dense quantization=duquant quantization.weights.granularity=32",
    "method=svdllm quantization=qsvd_w4a4",
    *(f"method=dense quantization={name}" for name in ("nf4", "gptq3", "awq", "kmeans", "kv4", "spinquant")),
)


def without_labels(cell: Any) -> dict[str, Any]:
    """The part of a record that older versions wrote too."""
    cfg = config.plain(cell.cfg)
    named = {"label": cell.label, "method": cfg["method"]["name"], "ratio": cell.ratio, "model": cell.source.name}
    calibrated = {"calibration": {}} if cell.calibration_data is not None else {}
    return {"config": cfg, "dataset": cfg["dataset"]["name"], **named, **calibrated}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_record_is_described_as_a_new_one(lab, command):
    [cell] = lab.cells(*command.split(), "ratio=0.6")
    new, derived = labels(cell), old.with_labels(without_labels(cell))
    for entry in ("quantization", "counts", "settings"):
        assert derived[entry] == new[entry]
    assert list(derived["settings"]) == list(new["settings"])  # tables show them in this order


def test_a_new_record_is_read_as_it_is(lab):
    described = without_labels(lab.cells("method=svd")[0]) | {"settings": {"metric": "Mine"}}
    assert old.with_labels(described) is described


@pytest.mark.parametrize("root", OLD, ids=lambda root: root.name)
def test_outdated_records_have_all_entries(root):
    records = Results(root).records()
    assert records
    for record in records:
        assert record["quantization"] == {"name": "none", "family": "none"}
        assert record["variant"] == {}
        assert {"counts", "settings"} <= record.keys()


def test_a_variant_is_what_differs_from_the_method(lab):
    def variant(command: str) -> dict[str, Any]:
        return labels(lab.cells(*command.split())[0])["variant"]

    assert variant("method=svdllm ratio=0.6 calibration.samples=3") == {}
    assert variant("method=asvd metric.alpha=0.25") == {"metric.alpha": 0.25}
    # settings of another refinement than the method's are part of it
    assert variant("method=svdllm refinement=lora") == {"refinement": "Lora"}
    assert variant("method=dense quantization=int4") == {"quantization": "INT4"}
    assert variant("method=asvd metric.alpha=0.25 method.name=mine") == {}
