"""Content-addressed artifacts: a key names a folder, and a folder that exists is complete.

A process writes an artifact into a temporary folder next to its final place and renames that when it is complete,
so a process killed at any moment leaves nothing that could be read by mistake. A lock per key lets one process
compute it while others wait and then read it, or do something else. This module imports no torch.
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

from lowrank_lab.artifacts.locks import locked
from lowrank_lab.basics.errors import UserError
from lowrank_lab.process.environment import versions

log = logging.getLogger(__name__)

MANIFEST = "artifact.json"
ELAPSED = ".seconds"  # in the folder of an unfinished resumable artifact: how long earlier runs worked on it


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder, whether it existed before, and the seconds that computing it took."""

    kind: str
    key: str
    path: Path
    reused: bool
    seconds: float


class Store:
    """Artifacts below ``root``, one folder each: ``<root>/<kind>/<key>/``.

    With ``waits`` False, ``get_or_make`` raises LockedByAnother where another process computes the artifact.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.waits = True

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def get(self, kind: str, key: str) -> Artifact | None:
        """The artifact if it is complete and its files are unchanged, else None.

        A file whose modification time has changed is checked against its SHA-256.
        """
        path = self.path(kind, key)
        if (place := not_readable(path)) is not None:
            raise UserError(f"{place} is not readable for you; its owner can mend that: chmod -R a+rX {path}")
        if not path.exists():
            return None
        manifest, wrong = examine(path)
        if manifest is None:
            log.warning("the artifact %s is damaged (%s); it is computed again", path, wrong)
            return None
        return Artifact(kind, key, path, reused=True, seconds=manifest["seconds"])

    def get_or_make(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        resumable: bool = False,
        manifest_beside: bool = False,
    ) -> Artifact:
        """Return the artifact ``key``, calling ``make(folder)`` to fill a new folder if it is not there.

        Only one process at a time computes a key; the others wait for it. If ``make`` raises, its folder is
        deleted. With ``resumable`` the folder stays, and the next ``make`` gets it with the files that this one
        wrote (``make`` must write each file whole or not at all); the seconds are the sum over all runs that were
        not killed. The manifest lists the library versions that computed the artifact. With ``manifest_beside`` it
        is a hidden file beside the folder, which then has nothing but what ``make`` wrote.
        """
        if existing := self.get(kind, key):
            return existing
        final = self.path(kind, key)
        with locked(final.parent / f".{key}.lease", f"{kind} {key}", self.waits):
            if existing := self.get(kind, key):
                return existing
            # We hold the lock, so a killed process left these files, or deleted only half of them.
            for leftover in [final, *final.parent.glob(f".{key}.tmp-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
            work = final.parent / (f".{key}.partial" if resumable else f".{key}.tmp-{uuid.uuid4().hex[:8]}")
            work.mkdir(exist_ok=resumable)
            (work / MANIFEST).unlink(missing_ok=True)  # a run that was stopped between writing it and renaming
            try:
                start = time.perf_counter() - _seconds_of_earlier_runs(work)
                make(work)
                seconds = time.perf_counter() - start
                for leftover in (work / ELAPSED, *work.glob(".*.tmp-*")):  # of runs that were stopped
                    leftover.unlink(missing_ok=True)
                made = [file for file in work.rglob("*") if file.is_file()]
                for file in made:
                    open_to_others(file)
                files = {str(file.relative_to(work)): _file_facts(file) for file in made}
                manifest = {
                    "kind": kind,
                    "key": key,
                    "seconds": seconds,
                    "files": files,
                    "versions": versions(),
                }
                write_json(beside(final) if manifest_beside else work / MANIFEST, manifest)
                os.replace(work, final)
            except BaseException as error:
                # A process that was halted for long has lost its lock: another one has been faster, or has deleted
                # our folder and computes the artifact now.
                lost = isinstance(error, Exception) and (not work.exists() or self.get(kind, key) is not None)
                if resumable and not lost:
                    write_json(work / ELAPSED, time.perf_counter() - start)
                else:
                    shutil.rmtree(work, ignore_errors=True)
                if not lost:
                    raise
            else:
                return Artifact(kind, key, final, reused=False, seconds=seconds)
        return self.get_or_make(kind, key, make, resumable, manifest_beside)

    def file_hash(self, file: str | Path) -> str:
        """SHA-256 of a file, cached by its path, size and modification time (models are large)."""
        file = Path(file).resolve()
        stat = file.stat()
        identity = {"file": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        cached = self.root / "hashes" / f"{fingerprint(str(file))}.json"
        try:
            entry = json.loads(cached.read_text(encoding="utf-8"))
            if {k: entry[k] for k in identity} == identity:
                return entry["sha256"]
        except (OSError, ValueError, KeyError):
            pass  # no cached hash yet, or one that cannot be read: hash the file again
        sha256 = _sha256(file)
        write_json(cached, {**identity, "sha256": sha256})
        return sha256

    def check_once(self, file: Path, rule: Any, check: Callable[[], None]) -> None:
        """Call ``check``, which raises for a bad file, unless a file of this content has passed ``rule``."""
        content = {"sha256": self.file_hash(file), "rule": rule}
        passed = self.root / "checks" / f"{fingerprint(content)}.json"
        if not passed.exists():
            check()
            write_json(passed, content)


def examine(folder: Path, thorough: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The manifest of an artifact whose files are unchanged; else None, and what is wrong with it.

    A file whose modification time has changed is checked against its SHA-256; ``thorough`` checks all.
    """
    try:
        file = beside(folder) if beside(folder).exists() else folder / MANIFEST
        manifest = json.loads(file.read_text(encoding="utf-8"))
        for name, facts in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return None, f"its manifest names {name}, which is outside of its folder"
            if not _is_unchanged(folder / name, facts, thorough):
                return None, f"{name} has changed"
        float(manifest["seconds"])
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except PermissionError as error:
        return None, f"{Path(error.filename).name} is not readable for you"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"its {MANIFEST} cannot be read"
    return manifest, ""


def beside(folder: Path) -> Path:
    """The manifest of an artifact that has it beside its folder."""
    return folder.with_name(f".{folder.name}.json")


def open_to_others(file: Path) -> None:
    """Let those read (and write) ``file`` who may its folder; safetensors gives it to its owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def not_readable(folder: Path) -> Path | None:
    """What this user may not read: ``folder`` (or file), a file in it, or a folder above it; None where it may all.

    Libraries say of such a file that it does not exist.
    """
    for place in reversed((folder, *folder.absolute().parents)):
        if os.path.isdir(place) and not _allowed(place, os.X_OK):  # os.path, as pathlib raises for odd names
            return place
    if not os.path.isdir(folder) or not _allowed(folder, os.R_OK):
        return folder if os.path.exists(folder) and not _allowed(folder, os.R_OK) else None
    files = (Path(entry) for entry in os.scandir(folder) if os.path.exists(entry))  # not links to nothing
    return next((file for file in files if not _allowed(file, os.R_OK)), None)


def _allowed(place: Path, how: int) -> bool:
    return os.access(place, how, effective_ids=os.access in os.supports_effective_ids) or not os.path.lexists(place)


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full. safetensors and torch say it in the message alone."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    texts = (f"os error {errno.ENOSPC}", f"os error {errno.EDQUOT}", "PytorchStreamWriter failed writing")
    return any(text in str(error) for text in texts)


def _seconds_of_earlier_runs(work: Path) -> float:
    try:
        return float(json.loads((work / ELAPSED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return 0.0  # this is the first run, or the last one was killed, whose time is not known


def _file_facts(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(file)}


def _is_unchanged(file: Path, facts: dict[str, Any], thorough: bool) -> bool:
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


def write_json(file: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON as ``write_text`` does, on one line with ``indent=None``."""
    write_text(file, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(file: str | Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part of it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.parent / f".{file.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)
