"""Modules that are imported at their first use, and what planning a grid may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowrank_lab.lazy_module import LazyModule
from tests.conftest import REPOSITORY

LARGE = {"torch", "transformers", "bitsandbytes"}
IMPORT_ALL = f"""
import pkgutil, sys
from importlib import import_module
for package in ("quantization.method", "quantization.transform", "quantization.latent"):
    folder = import_module(f"lowrank_lab.{{package}}")
    for module in pkgutil.iter_modules(folder.__path__, f"{{folder.__name__}}."):
        import_module(module.name)
        print(module.name, *({LARGE!r} & set(sys.modules)))
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


def test_no_option_of_a_quantization_imports_torch_before_it_computes():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {"lowrank_lab.quantization.method.gptq", "lowrank_lab.quantization.transform.awq"} < {
        name for name, *_ in lines
    }
    assert [name for name, *imported in lines if imported] == []
