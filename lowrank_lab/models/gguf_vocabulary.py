"""The tokenizer in a GGUF file's metadata: what kind it is, and whether it can be rebuilt. No torch."""

from __future__ import annotations

from typing import Any

# How the text is cut before it is merged, by the name of tokenizer.ggml.pre: regular expressions that are applied
# one after the other, each to the pieces of those before. From llama.cpp (src/llama-vocab.cpp) and the models'
# tokenizer.json files.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2 = (_WORDS,)
_SINGLE_DIGITS = (r"\p{N}", _WORDS)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MODERN = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (_CONTRACTIONS + _MODERN % "{1,3}",)
_QWEN2 = (_CONTRACTIONS + _MODERN % "",)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "gpt-4o": (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"),),
    "tekken": (_CASED % ("", "", ""),),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]"),
    "bloom": (r" ?[^(\s|[.,!?…。，、।۔،])]+",),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
# With these a piece of text that is a token is that token, whether or not merges lead to it; texts begin with BOS.
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken")
# Their tokenizer.json composes characters (Unicode's NFC) first.
COMPOSED = ("qwen2", "stablelm2", "mpt", "olmo")

SPECIAL = ("bos", "eos", "unknown", "padding")


def entry(metadata: dict[str, Any], name: str, otherwise: Any = None) -> Any:
    """What ``metadata`` says of the tokenizer under ``name``."""
    return metadata.get(f"tokenizer.ggml.{name}", otherwise)


def short(text: Any) -> str:
    """What a file says, for a message of one line."""
    return repr(str(text)).strip("'\"")[:40]


def fault(metadata: dict[str, Any], tokenizer_beside: bool) -> str | None:
    """Why no tokenizer can be made of a file's metadata, or None."""
    value = lambda name: entry(metadata, name)
    tokens, kind, pre = value("tokens"), value("model"), value("pre")
    if not isinstance(tokens, list) or not tokens:
        return "the file has no vocabulary (tokenizer.ggml.tokens)"
    for name in SPECIAL:
        number = value(f"{name}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            return f"its {name}_token_id is {number}, but its vocabulary has {len(tokens)} tokens"
    if tokenizer_beside:
        return None
    instead = "put the model's tokenizer.json beside the file"
    if len(set(tokens)) != len(tokens):
        return f"two tokens of its vocabulary are the same; {instead}"
    for key in ("token_type", "scores"):
        if value(key) is not None and len(value(key)) != len(tokens):
            return f"its vocabulary has {len(tokens)} tokens, but {len(value(key))} {key}; {instead}"
    if kind == "llama":
        if len(set(value("scores") or ())) < 2:
            return f"its SentencePiece tokenizer has no scores to merge by; {instead}"
        return None
    if kind != "gpt2":
        return f"its tokenizer is of kind {short(kind)}, which is not rebuilt; {instead}"
    if pre not in SPLITS:
        named = "does not say" if pre in (None, "default") else f"says by the unknown name {short(pre)}"
        return f"the file {named} how its tokenizer splits text (tokenizer.ggml.pre); {instead}"
    merges = value("merges")
    if not merges or any(merge.count(" ") != 1 for merge in merges):
        return f"its tokenizer has no merges, or broken ones; {instead}"
    return None
