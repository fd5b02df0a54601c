"""Texts and tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.calibration import jsonl
from lowrank_lab.calibration.corpora import EmbeddedWikipedia, HubCorpus, Part, text_of
from lowrank_lab.calibration.tokens import (
    load_tokens,
    make_calibration_tokens,
    make_text_tokens,
    sample_windows,
    tokenize,
)
from lowrank_lab.models.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def wikipedia() -> dict[str, list[str]]:
    return {split: list(EmbeddedWikipedia().documents(split, None)) for split in ("train", "test")}


def test_wikipedia_parts_share_no_article(wikipedia):
    train, test = wikipedia["train"], wikipedia["test"]
    assert len(train) == 85
    assert len(test) == 22
    assert not set(train) & set(test)
    assert sum(map(len, train)) > 2_000_000


def test_wikipedia_is_text_without_redirects(wikipedia):
    assert wikipedia["test"][0].startswith("'''Anarchism''' is a political philosophy")
    assert not any(text.lower().startswith("#redirect") for text in wikipedia["train"])


def corpus() -> HubCorpus:
    return HubCorpus("wikitext/wikitext-2-raw-v1", "Salesforce/wikitext", "wikitext-2-raw-v1", "text")


def test_mirror_is_read_and_identified_by_content(data_root, tmp_path):
    store = Store(tmp_path)
    text, documents = text_of(corpus(), Part("test", "|", 3), str(data_root))
    assert documents == 3
    assert text.count("|") == 2
    train = corpus().content("train", str(data_root), store)
    assert train != corpus().content("test", str(data_root), store)


def test_missing_mirror_file_is_named(data_root, tmp_path):
    with pytest.raises(UserError, match=r"no file .*wikitext-2-raw-v1/dev\.jsonl"):
        corpus().content("dev", str(data_root), Store(tmp_path))


def mirrored(root: Path, content: bytes) -> Path:
    """A mirror below ``root`` whose only file, a test split, has this ``content``."""
    folder = root / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not a JSON object"),
        (b"[1]", "line 2: not a JSON object but a list"),
        (b"\xff", "line 2: not UTF-8 text"),
        (b'{"txt": "a"}', "line 2: no field 'text'; it has: txt"),
        (b'{"text": null}', "line 2: field 'text' is not text but null"),
        (b'{"text": 5}', "line 2: field 'text' is not text but a number"),
        (b'{"text": ["a"]}', "line 2: field 'text' is not text but a list"),
        (b'{"text": "a\\ud800"}', "line 2: field 'text' has half a character"),
        (b"[" * 100_000, "line 2: not a JSON object"),
    ],
)
def test_a_bad_line_is_found_before_work(lab, tmp_path, line, message):
    root = mirrored(tmp_path / "data", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as error:
        lab.cells(f"data_root={root}", "method=dense")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": " "}\n'])
def test_a_file_without_text_is_found_before_work(lab, tmp_path, content):
    with pytest.raises(UserError, match=r"test\.jsonl: it has no text"):
        lab.cells(f"data_root={mirrored(tmp_path / 'data', content)}", "method=dense")


@pytest.mark.parametrize(
    "content",
    [
        b'\n{"text": "a"}\n  \n{"text": "b"}\n\n',
        b'{"text": "a"}\r\n\r\n{"text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
    ],
)
def test_blank_lines_and_what_editors_add_are_no_rows(tmp_path, content):
    root = mirrored(tmp_path / "data", content)
    corpus().content("test", str(root), Store(tmp_path / "store"))
    assert list(corpus().documents("test", str(root))) == ["a", "b"]


def test_a_file_is_read_through_once_for_its_content(tmp_path, monkeypatch):
    root, store = mirrored(tmp_path / "data", b'{"text": "a"}\n'), Store(tmp_path / "store")
    corpus().content("test", str(root), store)
    monkeypatch.setattr(jsonl, "rows", lambda file: pytest.fail("it is read again"))
    corpus().content("test", str(root), store)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not a JSON object"),
        (b'{"a": "x"}', "line 2: no field 'b'"),
        (b'{"a": null, "b": 1}', "line 2: field 'a' is null, in the first row it is not"),
        (b'{"a": "\\udc00", "b": 1}', "line 2 has half a character"),
        (b'\xef\xbb\xbf{"a": "x", "b": 1}', "line 2: it begins with a byte order mark"),
    ],
)
def test_a_bad_row_of_a_task_is_found(tmp_path, line, message):
    (file := tmp_path / "test.jsonl").write_bytes(b'{"a": "x", "b": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        jsonl.check_rows(file, Store(tmp_path / "store"))


def test_rows_of_a_task_may_have_nulls_where_the_first_has_one(tmp_path):
    (file := tmp_path / "test.jsonl").write_text('{"a": null, "b": 1}\n\n{"a": "x", "b": 2.5}\n')
    jsonl.check_rows(file, Store(tmp_path / "store"))


def test_hub_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="set data_root to a folder that holds wikitext"):
        corpus().content("test", None, Store(tmp_path))


def test_samples_are_windows_of_the_text_and_follow_the_seed():
    ids = np.arange(1000)
    for sampling in ("random", "disjoint"):
        windows = sample_windows(ids, 20, 32, seed=3, sampling=sampling)
        assert windows.shape == (20, 32)
        assert (np.diff(windows, axis=1) == 1).all()
        again = sample_windows(ids, 20, 32, seed=3, sampling=sampling)
        assert (windows == again).all()
        assert (windows != sample_windows(ids, 20, 32, seed=4, sampling=sampling)).any()


def test_disjoint_samples_share_no_token():
    windows = sample_windows(np.arange(1000), 31, 32, seed=0, sampling="disjoint")
    assert len(set(windows.flatten().tolist())) == 31 * 32


def test_every_start_can_be_drawn():
    starts = {int(w[0]) for w in sample_windows(np.arange(10), 500, 8, seed=0, sampling="random")}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("sampling", ["random", "disjoint"])
def test_text_that_is_too_short_raises(sampling):
    with pytest.raises(SkippedCell, match="calibration"):
        sample_windows(np.arange(20), 2, 32, seed=0, sampling=sampling)


def test_token_artifacts_say_what_they_hold(data_root, tmp_path):
    part = Part("train", "\n", 5)
    make_calibration_tokens(tmp_path, byte_tokenizer(), corpus(), part, str(data_root), 4, 16, 0, "random", None)
    ids, facts = load_tokens(tmp_path)
    assert ids.shape == (4, 16)
    assert facts["tokens"] == 64
    assert facts["documents"] == 5
    assert facts["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()


def test_calibration_windows_may_each_begin_with_a_bos(data_root, tmp_path):
    part = Part("train", "\n", None)
    make_calibration_tokens(tmp_path, byte_tokenizer(), corpus(), part, str(data_root), 4, 16, 0, "random", 1)
    ids, _ = load_tokens(tmp_path)
    assert ids.shape == (4, 16)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, 1:] > 3).all()


def test_text_tokens_are_the_whole_text(data_root, tmp_path):
    tokenizer = byte_tokenizer()
    make_text_tokens(tmp_path, tokenizer, corpus(), Part("test", "\n\n", None), str(data_root), True)
    ids, facts = load_tokens(tmp_path)
    rows = (data_root / "wikitext/wikitext-2-raw-v1/test.jsonl").read_text().splitlines()
    assert tokenizer.decode(ids) == "\n\n".join(json.loads(row)["text"] for row in rows)
    assert facts["tokens"] == len(ids)
    assert facts["characters"] == len(tokenizer.decode(ids))


def test_tokenize_adds_special_tokens_only_if_asked():
    class Tokenizer:
        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [1, 7, 8] if add_special_tokens else [7, 8]}

    assert tokenize(Tokenizer(), "text", True).tolist() == [1, 7, 8]
    assert tokenize(Tokenizer(), "text", False).tolist() == [7, 8]
