"""What tests compose is what Hydra composes."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from .composed import chosen, composed
from .conftest import REPOSITORY

JOBS = [
    "method=svdllm ratio=0.6 results=/tmp/x eval.ppl.seqlen=16",
    "ratio=0.6 method=svdllm ratio=1e-3 calibration.samples=4",
    "calibration.samples=4 experiment=dobi_figure8 seed=3",
    "quantization=gptq quantization/activations=int8 quantization.weights.bits=3",
    "eval=[ppl,generation] eval.generation.max_new_tokens=5",
    "method=dense quantization=spinquant save.merge=true dtype=bfloat16",
    "calibration={samples: 5} calibration.samples=6",  # left to Hydra
    "targets.blocks=[0,1] +mine=1 ~dry_run",
]


@pytest.mark.parametrize("words", JOBS)
def test_a_composed_configuration_is_hydras(words):
    job = words.replace(": ", ":").split()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        found, expected = composed("config", job, True), compose("config", job)
        again = composed("config", job, True)
    for cfg in (found, again):
        plain = OmegaConf.to_container(cfg)
        del plain["hydra"]
        assert plain == OmegaConf.to_container(expected)


def test_a_choice_of_options_is_composed_once():
    chosen.cache_clear()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        for ratio in ("0.3", "0.4"):
            assert composed("config", ["method=svd", f"ratio={ratio}"], True).ratio == float(ratio)
    assert chosen.cache_info().misses == 1
