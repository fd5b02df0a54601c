"""Content-addressed artifacts: a key names a folder, and a folder that exists is complete.

An artifact is made in a temporary folder beside its final place and renamed when it is finished, so a
process killed at any moment leaves nothing that could be read by mistake. A lock per key lets one process
make it while others wait and then read it, or do something else. This module imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_lab.artifacts.locks import held
from lowrank_lab.environment import versions

log = logging.getLogger(__name__)

MANIFEST = "artifact.json"
SPENT = ".seconds"  # in the folder of an unfinished resumable artifact: what earlier runs spent on it


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder, whether it was there already, and the seconds it took to make."""

    kind: str
    key: str
    path: Path
    reused: bool
    seconds: float


class Store:
    """Artifacts below ``root``, one folder each: ``<root>/<kind>/<key>/``.

    With ``waits`` False, what another process is making is not waited for: ``get_or_make`` raises Busy.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.waits = True

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def get(self, kind: str, key: str) -> Artifact | None:
        """The artifact if it is finished and its files are as they were written, else None.

        Contents are checked against their SHA-256 where a file's time has changed since it was written.
        """
        path = self.path(kind, key)
        if not path.exists():
            return None
        manifest, wrong = examine(path)
        if manifest is None:
            log.warning("the artifact %s is damaged (%s); it is made again", path, wrong)
            return None
        return Artifact(kind, key, path, reused=True, seconds=manifest["seconds"])

    def get_or_make(self, kind: str, key: str, make: Callable[[Path], None], resumable: bool = False) -> Artifact:
        """Return the artifact ``key``, calling ``make(folder)`` to fill a new folder if it is not there.

        Only one process at a time makes a key; the others wait for it. If ``make`` raises, nothing is left
        behind; with ``resumable`` the next ``make`` is given the same folder again, with what this one wrote
        (each file whole or absent, which is up to ``make``), and seconds are those of all runs but killed ones. The
        manifest keeps the library versions the artifact
        was made with.
        """
        if found := self.get(kind, key):
            return found
        final = self.path(kind, key)
        with held(final.parent / f".{key}.lease", f"{kind} {key}", self.waits):
            if found := self.get(kind, key):
                return found
            # We hold the lock: what a killed process left for this key, or half deleted, is rubbish.
            for leftover in [final, *final.parent.glob(f".{key}.tmp-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
            work = final.parent / (f".{key}.partial" if resumable else f".{key}.tmp-{uuid.uuid4().hex[:8]}")
            work.mkdir(exist_ok=resumable)
            (work / MANIFEST).unlink(missing_ok=True)  # a run that was stopped between writing it and renaming
            try:
                start = time.perf_counter() - _spent(work)
                make(work)
                seconds = time.perf_counter() - start
                for leftover in (work / SPENT, *work.glob(".*.tmp-*")):  # of runs that were stopped
                    leftover.unlink(missing_ok=True)
                files = {str(f.relative_to(work)): _facts(f) for f in work.rglob("*") if f.is_file()}
                manifest = {
                    "kind": kind,
                    "key": key,
                    "seconds": seconds,
                    "files": files,
                    "versions": versions(),
                }
                (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
                os.replace(work, final)
            except BaseException as error:
                # A process that was halted for long has lost its lock: somebody else has been faster, or has
                # cleared our folder away and is at it now.
                lost = isinstance(error, Exception) and (not work.exists() or self.get(kind, key) is not None)
                if resumable and not lost:
                    write_json(work / SPENT, time.perf_counter() - start)
                else:
                    shutil.rmtree(work, ignore_errors=True)
                if not lost:
                    raise
            else:
                return Artifact(kind, key, final, reused=False, seconds=seconds)
        return self.get_or_make(kind, key, make, resumable)

    def file_hash(self, file: str | Path) -> str:
        """SHA-256 of a file, remembered by its path, size and modification time (models are large)."""
        file = Path(file).resolve()
        stat = file.stat()
        identity = {"file": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        memo = self.root / "hashes" / f"{fingerprint(str(file))}.json"
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
            if {k: known[k] for k in identity} == identity:
                return known["sha256"]
        except (OSError, ValueError, KeyError):
            pass  # no memo yet, or one that cannot be read: hash the file again
        sha256 = _sha256(file)
        write_json(memo, {**identity, "sha256": sha256})
        return sha256


def examine(folder: Path, thorough: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The manifest of an artifact whose files are as they were written; else None, and what is wrong with it.

    A file's content is compared with its SHA-256 where its time has changed since; ``thorough`` compares all.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, facts in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return None, f"its manifest names {name}, which is elsewhere"
            if not _as_written(folder / name, facts, thorough):
                return None, f"{name} is not as it was written"
        float(manifest["seconds"])
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"its {MANIFEST} cannot be read"
    return manifest, ""


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full. safetensors and torch tell so in their texts alone."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    texts = (f"os error {errno.ENOSPC}", f"os error {errno.EDQUOT}", "PytorchStreamWriter failed writing")
    return any(text in str(error) for text in texts)


def _spent(work: Path) -> float:
    try:
        return float(json.loads((work / SPENT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0.0  # the first run, or one that was killed: its time is not known


def _facts(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(file)}


def _as_written(file: Path, facts: dict[str, Any], thorough: bool) -> bool:
    stat = file.stat()
    if stat.st_size != facts["size"]:
        return False
    return (stat.st_mtime_ns == facts["mtime_ns"] and not thorough) or _sha256(file) == facts["sha256"]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash of plain data: equal data, equal string; key order does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def write_json(file: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a half."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.parent / f".{file.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        work.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)
