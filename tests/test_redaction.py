"""Secrets: taken out of all that is written or printed, and refused on the command line."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.redaction import (
    HIDDEN,
    Formatter,
    redacted,
    redacted_message,
    redacted_settings,
    refuse,
    refuse_in,
)
from lowrank_lab.records.results import _without_secrets

from .conftest import FORKS, REPOSITORY

pytestmark = pytest.mark.own_artifacts

HUB = "hf_" + "aB3dE6gH9j" * 3
OLD_WANDB = "0123456789abcdef" * 2 + "01234567"  # 40 hexadecimal digits, like a commit
WANDB = "wandb_v1_" + "Q2w4E6r8T0" * 4
OWN = "correct-horse-battery-42"


@pytest.fixture
def secrets(monkeypatch, tmp_path) -> list[str]:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password of-netrc-77\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", OLD_WANDB)
    monkeypatch.setenv("DEPLOY_SECRET", OWN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return [HUB, OLD_WANDB, WANDB, OWN, "of-netrc-77", "hunter22"]


def test_what_is_a_secret(secrets):
    for secret in secrets[:-1]:
        assert redacted(f"before {secret}, after") == f"before {HIDDEN}, after"
    assert redacted("https://me:hunter22@host/path") == f"https://{HIDDEN}@host/path"
    assert redacted({"a": [{HUB: (OWN,)}]}) == {"a": [{HIDDEN: [HIDDEN]}]}


@pytest.mark.parametrize(
    "text",
    [
        "password=hunter22",
        "password: hunter22",
        "'api_key': 'hunter22'",
        "Authorization: Bearer hunter22",
        "hub_token=hunter22",
        "https://host/path?token=hunter22&x=1",
    ],
)
def test_what_a_message_says_is_one(secrets, text):
    assert "hunter22" not in redacted_message(text) and HIDDEN in redacted_message(text)


def test_settings_are_ones_by_their_names(secrets):
    settings = {"a": [{"password": "hunter22", "token": "hunter22", "other": f"of {OWN}"}], "secret": 12345678}
    expected = {"a": [{"password": HIDDEN, "token": HIDDEN, "other": f"of {HIDDEN}"}], "secret": 12345678}
    assert redacted_settings(settings) == expected


NOT_SECRET = [
    "method.name=svd",
    "++eval.generation.eos_token=im_end12345",
    "pad_token=eot_id_128009",
    "eos_token=<|endoftext1|>",
    "model.path=/data/hf_llama27bchatweights/x",
    "model.path=/scratch/token=abc12345/x",
    "x.token=12345678",
    "x.password=${oc.env:DEPLOY_SECRET}",
    "x.secret_file=/home/me/secret1",
]


@pytest.mark.parametrize("word", NOT_SECRET)
def test_settings_that_are_none(secrets, word):
    refuse([word])
    name, _, value = word.partition("=")
    name = name.lstrip("+").split(".")[-1]
    refuse_in({"x": {name: [value]}})
    assert redacted_settings({name: value, "x": word}) == {name: value, "x": word}
    assert redacted_message(word) == word


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "abcd1234", True),
        ("token", "abcd1234", True),
        ("OPENAI_APIKEY", "abcd1234", True),
        ("AWS_ACCESS_KEY_ID", "ABCDEFGHIJ12", True),
        ("DB_PASSWD", "tiny-llama", True),
        ("TOKENIZER_MODEL", "tiny:llama", False),
        ("TOKENIZER_TYPE", "wikipedia", False),
        ("TOKENIZERS_PARALLELISM", "false-or-true1", False),
        ("MAX_TOKENS", "tiny:llama2", False),
        ("SUBTOKEN", "tiny:llama2", False),
        ("PASSWORDLESS", "tiny:llama2", False),
        ("EOS_TOKEN", "<|im_end|>", False),
        ("HF_TOKEN_PATH", "token-of-mine-1", False),
        ("HF_TOKEN", "1234567890", False),
        ("HF_TOKEN", "/home/me/token1", False),
        ("HF_TOKEN", "wikipedia", False),
        ("HF_TOKEN", "abc123", False),
    ],
)
def test_variables_are_ones_by_their_whole_names(monkeypatch, name, value, secret):
    monkeypatch.setenv(name, value)
    assert redacted(f"of {value} x") == (f"of {HIDDEN} x" if secret else f"of {value} x")


def test_what_is_none(monkeypatch):
    innocent = {
        "commit": OLD_WANDB,
        "path": "/home/me/.cache/huggingface/token false",
        "sizes": {"kv_cache_bytes_per_token": 12345678, "macs_per_token": 87654321, "value": 1.5, "none": None},
        "reason": "12 calibration tokens are fewer; first token: 80, token position 31; it has no secret: it is 1",
        "traceback": "eos_token=a.eos_token, token=token\nunexpected token: '<|fim_suffix_1|>', token: im_end12",
        "address": "https://huggingface.co/facebook/opt-125m@main file:///home/me@work/x",
        "hf": "hf_internal_testing hf_meetsallthethingsthatonecouldsayofit",
        "config": {"password": 12345678, "macs_per_token": 87654321},
        "metrics": {
            "password": "hunter22",
            "answer": "The secret: remember to breathe. My password: abcd1234.",
            "token": 1,
        },
    }
    assert _without_secrets(innocent) == redacted(innocent) == innocent


FAILING = """
import os, runpy, sys
from lowrank_lab.lowrank import spectra
def fails(*_):
    print("printed", os.environ["DEPLOY_SECRET"])
    raise RuntimeError(f"no entry for https://me:hunter22@host, {os.environ['SAYS']}")
spectra.decompose = fails
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.parametrize("multirun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_that_is_written_or_printed_holds_one(lab, secrets, monkeypatch, tmp_path, multirun):
    """Given in the environment and in the text of an exception: records, grids, logs, W&B's copies, the screen."""
    monkeypatch.setenv("SAYS", ", ".join(secrets[:-1]))
    words = lab.overrides("method=svd", "tracker=wandb", "method.name=of_${oc.env:DEPLOY_SECRET}")
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = FORKS.run(str(script), *(["-m"] if multirun else []), *words)
    assert done.returncode == 1
    [record] = lab.results.records()
    assert (record["status"], record["method"]) == ("failed", f"of_{HIDDEN}")
    assert f"https://{HIDDEN}@host, {HIDDEN}" in record["reason"] and HIDDEN in record["traceback"]
    assert f"printed {HIDDEN}" in done.stdout and HIDDEN in done.stderr
    written = {file: file.read_bytes() for file in lab.root.rglob("*") if file.is_file()}
    kinds = {file.relative_to(lab.root).parts[0] for file in written}
    assert kinds >= {"records", "grids", "logs", "wandb"}
    for secret in secrets:
        assert secret not in done.stdout + done.stderr
        assert [file for file, content in written.items() if secret.encode() in content] == []
        assert not any(secret in str(file) for file in written)


def test_a_checkpoint_is_not_named_by_one(lab, secrets):
    record = lab.run("method=svd", "method.name=of_${oc.env:DEPLOY_SECRET}", "save=true")
    assert OWN not in record["checkpoint"]
    assert (lab.root / record["checkpoint"]).is_dir()
    assert OWN not in "".join(f.read_text() for f in (lab.root / record["checkpoint"]).glob("*.json"))


@pytest.mark.parametrize(
    ("word", "setting"),
    [(f"method.name={HUB}", "method.name"), ("+wandb.api_key=hunter22", "+wandb.api_key"), (f"+x={OWN}", "+x")],
)
def test_the_command_line_is_no_place_for_one(lab, secrets, word, setting):
    with pytest.raises(UserError, match="set it in the environment") as error:
        refuse(["method=svd", word])
    assert str(error.value).startswith(f"{setting}: ")


def test_the_command_stops_before_anything_is_written(lab, secrets):
    done = lab.cli(f"method.name={HUB}", check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: method.name: a key or password must not be on a command line")
    assert not lab.root.exists()


@pytest.mark.parametrize("methods", ["mine", "mine,svd", "svd,mine"])
def test_nor_is_a_file_of_ones_own(lab, secrets, tmp_path, methods):
    """Wherever in a sweep it is chosen. But it may name the variable that has it."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    file = tmp_path / "conf" / "method" / "mine.yaml"
    lines = ["# @package _global_", "defaults: [svd]", "method: {name: mine}", "mine: {api_key: hunter22}"]
    words = (f"method={methods}", f"hydra.searchpath=[file://{tmp_path}/conf]")
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"^mine\.api_key: a key or password must not be"):
        lab.cells(*words, multirun="," in methods)
    file.write_text("\n".join(lines).replace("hunter22", "'${oc.env:DEPLOY_SECRET}'"))
    assert lab.cells(*words, multirun="," in methods)


def test_log_lines_and_their_tracebacks(secrets):
    try:
        raise ValueError(OWN)
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "key %s", (HUB,), sys.exc_info())
    line = Formatter("%(message)s").format(record)
    assert line.startswith(f"key {HIDDEN}\nTraceback") and line.endswith(f"ValueError: {HIDDEN}")


def test_every_logging_configuration_has_the_formatter():
    for file in Path(REPOSITORY, "conf", "hydra").glob("*_logging/*.yaml"):
        lines = file.read_text().splitlines()
        assert sum("format:" in line for line in lines) == sum("redaction.Formatter" in line for line in lines) > 0


def test_a_report_prints_none(lab, secrets):
    record = lab.run("method=svd")
    record["reason"], record["status"] = "x", "failed"
    file = lab.results.path(record["key"])
    lab.results.write(record)
    old = json.loads(file.read_text())  # as a version without redaction wrote it
    del old["sha256"]
    file.write_text(json.dumps({**old, "reason": f"no entry with {OWN}"}))
    done = FORKS.run("report.py", "--results", str(lab.root))
    assert f"no entry with {HIDDEN}" in " ".join(done.stdout.split())
