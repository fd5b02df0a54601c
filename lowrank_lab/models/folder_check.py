"""What is wrong with a model folder, from its files' names and headers: found before any work. No torch.

Whether the tensors are those that the model has is found where it is loaded (load.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import quantized_by_others, weight_files
from lowrank_lab.models.own_config import unguarded
from lowrank_lab.models.vision_families import IMAGE_TASK, IMAGE_TEXT_TASK, TEXT_TASK, task_of
from lowrank_lab.models.weight_files import NAMES, DamagedFile, RunsCode

ADAPTER = "adapter_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # of a model of images and text: it may hold that of the images
READ_AS_JSON = (
    IMAGE_PROCESSOR,
    PROCESSOR,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
OTHER_TOKENIZERS = (".tiktoken", ".spm", "piece.model", "bpe.model", ".py")
MERGE = "merge it into its base model (peft: merge_and_unload) and save the result in a folder of its own"


def settings_of(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder that is whole.

    Raises UserError, naming the file, for one that is incomplete or damaged, that has an adapter in it, or whose
    weights another tool has quantized.
    """
    state = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file())
    return _checked(folder, state)


def check_snapshot(name: str, folder: Path) -> dict[str, Any]:
    """The config.json of a model of the hub, whose other files may not be in ``folder`` yet.

    Raises UserError for one that is damaged, and for weights that another tool has quantized.
    """
    try:
        settings = _config(folder)
        if quantized_by_others.entry_in(settings) is not None:
            try:
                tensors = _tensors(folder, settings)
            except UserError:  # they are not here yet
                tensors = {}
            _refuse_quantized(folder, settings, tensors)
    except UserError as error:
        raise UserError(str(error).replace(f"model.path={folder}:", f"model.path={name}:")) from None
    return settings


@cache  # every cell asks
def _checked(folder: Path, _state: tuple[Any, ...]) -> dict[str, Any]:
    settings = _config(folder)
    tensors = _tensors(folder, settings)
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"model.path={folder}: an adapter lies beside the model ({ADAPTER}), and which of the two is meant is "
            f"not known: {MERGE}, or move the adapter's files elsewhere"
        )
    _refuse_quantized(folder, settings, tensors)
    for name in READ_AS_JSON:
        if (folder / name).is_file():
            _object(folder, name)
    task = task_of(settings.get("model_type"))
    if task != IMAGE_TASK:
        of_text = settings.get("text_config") if task == IMAGE_TEXT_TASK else settings
        _check_tokenizer(folder, of_text if isinstance(of_text, dict) else {})
    if task != TEXT_TASK:
        allowed = (IMAGE_PROCESSOR, *((PROCESSOR,) if task == IMAGE_TEXT_TASK else ()))
        if not any((folder / name).is_file() for name in allowed):
            raise UserError(f"model.path={folder}: the folder has no {' or '.join(allowed)}; copy it into it")
    return settings


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            base = _object(folder, ADAPTER).get("base_model_name_or_path")
            raise UserError(f"model.path={folder}: the folder has only an adapter (of {base}): {MERGE}")
        ggufs = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
        hint = f"give one file of it, such as {folder / ggufs[0]}" if ggufs else "is it a saved model?"
        raise UserError(f"model.path={folder}: the folder has no config.json; {hint}")
    settings = _object(folder, "config.json")
    if not isinstance(settings.get("model_type"), str):
        raise UserError(f"model.path={folder}: its config.json is not one of a model (no model_type)")
    heads, shared = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise UserError(
            f"model.path={folder}: in config.json num_attention_heads={heads} is no multiple of "
            f"num_key_value_heads={shared}"
        )
    try:
        return unguarded(settings)
    except ValueError as error:
        raise UserError(f"model.path={folder}: {error}") from None


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file. Raises UserError for one that holds no object."""
    file = folder / name
    if file.stat().st_size == 0:
        raise UserError(f"model.path={folder}: {name} is empty; get the file again")
    if weight_files.is_pointer(file):
        raise UserError(f"model.path={folder}: {name} {weight_files.POINTER}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"model.path={folder}: {name} is not JSON; get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"model.path={folder}: {name} holds no JSON object; get the file again")
    return content


def _tensors(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The dtypes of the weights by name, of all files that belong to the model."""
    for name in NAMES:
        if name.endswith(".index.json") and (folder / name).is_file():
            _shards(folder, folder / name)
    file = weight_files.found_in(folder, settings)
    if file is None:
        raise UserError(f"model.path={folder}: {_no_weights(folder)}")
    if not file.name.endswith(".index.json"):
        return _header(folder, settings, file.name)
    tensors: dict[str, str] = {}
    shards = _shards(folder, file)
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise UserError(f"model.path={folder}: {file.name} names {shard}, which is missing; get that file")
        tensors.update(_header(folder, settings, shard))
    if any(tensors.values()) and (lacking := sorted(shards.keys() - tensors.keys())):
        raise UserError(
            f"model.path={folder}: {file.name} says that {shards[lacking[0]]} has {lacking[0]}, which it lacks; "
            "get that file again"
        )
    return tensors


def _no_weights(folder: Path) -> str:
    files = sorted(folder.iterdir())
    if any(file.name.startswith("adapter_model.") for file in files):
        return f"the folder has only an adapter: {MERGE}"
    if broken := [file.name for file in files if file.is_symlink() and not file.exists()]:
        return f"{broken[0]} is a link to a file that is not there; copy the files that links lead to"
    if others := [file.name for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5")]:
        return f"its weights must have a name that transformers reads ({', '.join(NAMES)}), not {others[0]}"
    if unfinished := [file.name for file in files if file.suffix in (".incomplete", ".part", ".crdownload")]:
        return f"the folder has no .safetensors or .bin weights, but {unfinished[0]}: the download is not complete"
    return "the folder has no .safetensors or .bin weights"


def _shards(folder: Path, index: Path) -> dict[str, str]:
    """The files of the weights by name, from an index. Raises UserError where one is outside of the folder."""
    try:
        shards = {str(name): str(file) for name, file in _object(folder, index.name)["weight_map"].items()}
    except (KeyError, AttributeError):
        shards = {}
    if not shards:
        raise UserError(f"model.path={folder}: {index.name} has no weight_map; get the file again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise UserError(f"model.path={folder}: {index.name} names {name}, which is not in this folder")
    return shards


def _header(folder: Path, settings: Mapping[str, Any], name: str) -> dict[str, str]:
    try:
        return weight_files.tensors_in(folder / name)
    except DamagedFile as error:
        raise UserError(f"model.path={folder}: {name} {error}") from None
    except RunsCode as error:
        entry = quantized_by_others.entry_in(settings)
        why = weight_files.RUNS_CODE if entry is None else quantized_by_others.refusal(entry, f"{name} has {error}")
        raise UserError(f"model.path={folder}: {why}") from None


def _refuse_quantized(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, str]) -> None:
    """Raises UserError for weights that another tool has quantized, not where only config.json says so."""
    if settings.get("quantization_config") and not isinstance(settings["quantization_config"], dict):
        raise UserError(f"model.path={folder}: quantization_config in config.json is no JSON object; remove it")
    entry, found = quantized_by_others.entry_in(settings), quantized_by_others.tensor_in(tensors)
    if quantized_by_others.is_ours(settings) or (found is None and (entry is None or tensors)):
        return
    name, tool = found or ("its config.json says so", "")
    raise UserError(f"model.path={folder}: {quantized_by_others.refusal(entry or tool, name)}")


def _check_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    names = [file.name for file in folder.iterdir() if file.is_file()]
    found = [name for name in names if name in TOKENIZERS or name.endswith(OTHER_TOKENIZERS)]
    if not found:
        raise UserError(f"model.path={folder}: the folder has no tokenizer; copy its files into it")
    for name in found:
        if (folder / name).stat().st_size == 0:
            raise UserError(f"model.path={folder}: {name} is empty; get the file again")
        if weight_files.is_pointer(folder / name):
            raise UserError(f"model.path={folder}: {name} {weight_files.POINTER}")
    if "tokenizer.json" in names:
        _check_vocabulary(folder, settings.get("vocab_size"))


def _check_vocabulary(folder: Path, vocab_size: Any) -> None:
    """Raises UserError where the model has too few embeddings for the tokens of text.

    Tokens that were added for a training, such as one for padding, need not have an embedding.
    """
    model = _object(folder, "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)):
        raise UserError(f"model.path={folder}: tokenizer.json has no vocabulary; get the file again")
    if isinstance(vocab_size, int) and len(vocabulary) > vocab_size:
        raise UserError(
            f"model.path={folder}: tokenizer.json has {len(vocabulary)} tokens, but the model only {vocab_size} "
            "(vocab_size in config.json); it is the tokenizer of another model"
        )
