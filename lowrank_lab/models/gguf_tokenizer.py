"""The tokenizer of a GGUF file, rebuilt from the file's metadata or taken from a tokenizer.json beside it.

transformers' own reader takes BOS for EOS, cuts every text as GPT-2 does, and merges SentencePiece's pieces by
other rules, so that it is not used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lowrank_lab.models import gguf_vocabulary
from lowrank_lab.models.gguf_vocabulary import entry

# Numbers of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTES = re.compile("<0x[0-9A-F]{2}>")
SPACE = "▁"  # what SentencePiece writes for a space

# Any tokenizer of natural text gives these back.
SENTENCES = (
    "The quick brown fox, aged 27, didn't jump over 1,024 lazy dogs.",
    "A naïve café – 北京, Москва 😀",
    "first line\n\n  indented line\tand a tab",
)
MOSTLY = 0.9  # of ordinary tokens: each is met by its own text, but for rare ones that no merges lead to


def build(metadata: dict[str, Any], tokenizer_json: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that ``metadata`` describes (its kind must have been checked), with its special tokens."""
    value = lambda name: entry(metadata, name)
    tokens = value("tokens")
    if tokenizer_json is not None:
        backend = Tokenizer.from_file(str(tokenizer_json))
    else:
        backend = sentencepiece(metadata) if value("model") == "llama" else byte_level(metadata)
        backend.post_processor = _around(metadata)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    numbers = {argument: value(f"{name}_token_id") for argument, name in names.items()}
    special = {argument: None if number is None else tokens[number] for argument, number in numbers.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece's merging: of all neighbours that are a piece together, those of the highest score first.

    What is no piece is written as bytes. Pieces of the user are cut out of the text before, the longest first.
    This is how SentencePiece's BPE models and llama.cpp tokenize, and what a tokenizer.json of LLaMA or Gemma says.
    """
    tokens, scores = entry(metadata, "tokens"), entry(metadata, "scores")
    types = _types(metadata)
    mergeable = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    }
    unknown = entry(metadata, "unknown_token_id")
    model = BPE(
        {token: number for number, token in enumerate(tokens)},
        merges_by_score(mergeable),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = entry(metadata, "add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    _cut_out(tokenizer, metadata)
    return tokenizer


def merges_by_score(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of ``pieces`` that are a piece together, the piece of the highest score first.

    Of pairs that make the same piece the one with the longer left part is first, as in transformers' conversion of
    SentencePiece models.
    """
    merges = [
        (score, cut, piece)
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [(piece[:cut], piece[cut:]) for _, cut, piece in merges]


def byte_level(metadata: dict[str, Any]) -> Tokenizer:
    """GPT-2's kind: the merges of the file, on bytes, within what the expressions of its ``pre`` cut."""
    tokens, pre = entry(metadata, "tokens"), entry(metadata, "pre")
    merges = [tuple(merge.split(" ")) for merge in entry(metadata, "merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre in gguf_vocabulary.WHOLE_PIECES))
    if pre in gguf_vocabulary.COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in gguf_vocabulary.SPLITS[pre]]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    _cut_out(tokenizer, metadata)
    return tokenizer


def _types(metadata: dict[str, Any]) -> list[int]:
    """Of every token its type; in old files, which do not say, by its use and its form."""
    tokens = entry(metadata, "tokens")
    if (types := entry(metadata, "token_type")) is not None:
        return types
    special = {entry(metadata, f"{name}_token_id") for name in gguf_vocabulary.SPECIAL}
    return [CONTROL if n in special else BYTE if BYTES.fullmatch(t) else NORMAL for n, t in enumerate(tokens)]


def _cut_out(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Make ``tokenizer`` find control tokens and the user's tokens in a text before it merges anything."""
    tokens, types = entry(metadata, "tokens"), _types(metadata)
    of = lambda kinds: [token for token, kind in zip(tokens, types, strict=True) if kind in kinds and token]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in of((UNKNOWN, CONTROL))])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in of((USER_DEFINED,))])


def _around(metadata: dict[str, Any]) -> Any:
    """The step that puts BOS before and EOS behind a text where the file says so."""
    value = lambda name: entry(metadata, name)
    by_default = value("model") == "llama" or value("pre") in gguf_vocabulary.WHOLE_PIECES
    number = lambda name, add: value(f"{name}_token_id") if add else None
    bos = number("bos", by_default if value("add_bos_token") is None else value("add_bos_token"))
    eos = number("eos", value("add_eos_token"))
    tokens = value("tokens")
    before, after = ([] if n is None else [tokens[n]] for n in (bos, eos))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(tokens[n], n) for n in {bos, eos} - {None}],
    )


def fault(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Any]) -> str | None:
    """In what ``tokenizer`` contradicts the vocabulary of the file, or None."""
    tokens = entry(metadata, "tokens")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    beside = "the model's own tokenizer.json beside the file"
    if len(tokenizer) > len(tokens):
        return f"its tokenizer has {len(tokenizer)} tokens, but its vocabulary {len(tokens)}; put {beside}"
    known = tokenizer.get_vocab()
    numbers = _samples(metadata)
    if strange := [tokens[number] for number in numbers if known.get(tokens[number]) != number]:
        return f"tokenizer.json is not of this model: it has another number for {strange[0]!r}; put {beside}"
    for sentence in SENTENCES:
        back = tokenizer.decode(encode(sentence), clean_up_tokenization_spaces=False)
        if back != sentence:
            return f"its tokenizer makes {back!r} of {sentence!r}; put {beside}"
    met = sum(encode(tokenizer.convert_tokens_to_string([tokens[number]])) == [number] for number in numbers)
    if met < MOSTLY * len(numbers):
        return f"its tokenizer finds {met} of {len(numbers)} of its own words; put {beside}"
    return None


def _samples(metadata: dict[str, Any]) -> list[int]:
    """About 500 ordinary tokens from the whole vocabulary, each of which is a word or the beginning of one."""
    tokens, types = entry(metadata, "tokens"), _types(metadata)
    words = [
        n for n, token in enumerate(tokens) if types[n] == NORMAL and token[:1] in "▁Ġ" and token[1:].isalpha()
    ]
    return words[:: max(1, len(words) // 500)]
