"""Modules that are imported at their first use, and what planning a grid may import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lowrank_lab.basics.lazy_module import LazyModule
from tests.conftest import REPOSITORY

LARGE = {"torch", "transformers", "bitsandbytes", "peft", "lm_eval"}
IMPORT_ALL = f"""
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
    print(name, *({LARGE!r} & set(sys.modules)))
"""


def test_a_module_is_imported_at_its_first_use():
    colorsys = LazyModule("colorsys")
    sys.modules.pop("colorsys", None)
    assert "colorsys" not in sys.modules
    assert colorsys.rgb_to_hsv(1, 1, 1) == (0, 0, 1)
    assert "colorsys" in sys.modules


def test_a_missing_module_or_attribute_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = LazyModule("no_such_module").anything
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = LazyModule("math").no_such_name


def test_no_option_imports_torch_before_it_computes():
    """The modules of all classes that conf/ names: planning a grid imports them."""
    texts = [file.read_text(encoding="utf-8") for file in (REPOSITORY / "conf").rglob("*.yaml")]
    modules = {name for text in texts for name in re.findall(r"_target_: (lowrank_lab\.[\w.]+)\.\w+", text)}
    assert {"lowrank_lab.quantization.method.gptq", "lowrank_lab.evaluation.speed"} < modules
    assert len({name.rpartition(".")[0] for name in modules}) > 8, "not all packages were found"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *sorted(modules)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(modules)
    assert [line for line in lines if line[1:]] == []
