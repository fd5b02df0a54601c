"""From text to token ids, and from token ids to calibration samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.calibration.corpora import Corpus, Part, text_of

Sampling = Literal["random", "disjoint"]


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool) -> np.ndarray:
    """Token ids (tokens,) int64 of the whole text as one sequence."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def check_in_vocabulary(largest: int, config: Any) -> None:
    """Raise UserError where the model of ``config`` does not have the token ``largest``."""
    size = getattr(config, "vocab_size", None)
    if size is not None and largest >= size:
        raise UserError(
            f"model.path: its tokenizer gives token {largest}, but the model has only {size} (vocab_size in "
            "config.json); it is the tokenizer of another model"
        )


def sample_windows(ids: np.ndarray, samples: int, seqlen: int, seed: int, sampling: Sampling) -> np.ndarray:
    """Draw ``samples`` windows (samples, seqlen) from a token stream (tokens,), reproducibly from ``seed``.

    ``random`` draws start positions uniformly with replacement, as the papers' code does, so windows may
    overlap. ``disjoint`` draws without replacement from the non-overlapping windows.
    Raises SkippedCell where the text is too short.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    if sampling == "random":
        if len(ids) < seqlen:
            raise SkippedCell(f"the calibration text has {len(ids)} tokens, fewer than seqlen={seqlen}")
        starts = generator.integers(0, len(ids) - seqlen + 1, size=samples)
    else:
        windows = len(ids) // seqlen
        if windows < samples:
            raise SkippedCell(
                f"the calibration text has {windows} disjoint windows of {seqlen} tokens, fewer than "
                f"calibration.samples={samples}; take fewer or shorter ones, or calibration.sampling=random"
            )
        starts = generator.permutation(windows)[:samples] * seqlen
    return np.stack([ids[start : start + seqlen] for start in starts])


def _save(folder: Path, ids: np.ndarray, part: Part, documents: int, characters: int) -> None:
    save_file({"ids": np.ascontiguousarray(ids)}, folder / "tokens.safetensors")
    facts = {
        "split": part.split,
        "join": part.join,
        "documents": documents,
        "characters": characters,
        "tokens": int(ids.size),
        "sha256": hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest(),
    }
    (folder / "tokens.json").write_text(json.dumps(facts, indent=1))


def make_text_tokens(
    folder: Path, tokenizer: Any, corpus: Corpus, part: Part, data_root: str | None, add_special_tokens: bool
) -> None:
    """The artifact of an evaluation text: all its tokens (tokens,)."""
    text, documents = text_of(corpus, part, data_root)
    _save(folder, tokenize(tokenizer, text, add_special_tokens), part, documents, len(text))


def make_calibration_tokens(
    folder: Path,
    tokenizer: Any,
    corpus: Corpus,
    part: Part,
    data_root: str | None,
    samples: int,
    seqlen: int,
    seed: int,
    sampling: Sampling,
    bos_id: int | None,
) -> None:
    """The artifact of a calibration set: its windows (samples, seqlen), each after a BOS if ``bos_id``."""
    text, documents = text_of(corpus, part, data_root)
    stream = tokenize(tokenizer, text, add_special_tokens=bos_id is None)
    if bos_id is None:
        ids = sample_windows(stream, samples, seqlen, seed, sampling)
    else:
        ids = sample_windows(stream, samples, seqlen - 1, seed, sampling)
        ids = np.concatenate([np.full((samples, 1), bos_id), ids], axis=1)
    _save(folder, ids, part, documents, len(text))


def load_tokens(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids of a token artifact, and the facts about them that go into the record."""
    return load_file(folder / "tokens.safetensors")["ids"], json.loads((folder / "tokens.json").read_text())
