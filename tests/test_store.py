"""The artifact store: whole or absent, made once, whatever happens to the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_lab.artifacts.store import MANIFEST, Store, fingerprint, write_json


def fill(text: str):
    return lambda folder: (folder / "data").write_text(text)


def test_made_once_then_reused(tmp_path):
    store = Store(tmp_path)
    first = store.get_or_make("kind", "key", fill("one"))
    second = store.get_or_make("kind", "key", fill("two"))
    assert not first.reused
    assert second.reused
    assert second.seconds == pytest.approx(first.seconds)
    assert (second.path / "data").read_text() == "one"


def test_a_manifest_beside_the_folder_leaves_it_alone(tmp_path):
    store = Store(tmp_path)
    make = lambda text: store.get_or_make("kind", "key", fill(text), manifest_beside=True)
    path = make("one").path
    assert [file.name for file in path.iterdir()] == ["data"]
    assert make("two").reused
    (path / "data").write_text("changed")
    assert store.get("kind", "key") is None
    assert (make("three").path / "data").read_text() == "three"
    (path.parent / ".key.json").unlink()  # as where the folder alone was copied
    assert store.get("kind", "key") is None


def test_a_failure_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def breaks(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.get_or_make("kind", "key", breaks)
    assert store.get("kind", "key") is None
    assert [f.name for f in (tmp_path / "kind").iterdir() if "tmp" in f.name] == []
    assert (store.get_or_make("kind", "key", fill("whole")).path / "data").read_text() == "whole"


def test_what_is_half_deleted_is_made_again(tmp_path):
    """Without its manifest, without one of its files, or with a file cut short."""
    store = Store(tmp_path)
    for damage in ("artifact.json", "data"):
        path = store.get_or_make("kind", "key", fill("whole")).path
        (path / damage).unlink()
        assert store.get("kind", "key") is None
    for damage in ("who", "WHOLE"):  # cut short; of the same size
        path = store.get_or_make("kind", "key", fill("whole")).path
        (path / "data").write_text(damage)
        assert not store.get_or_make("kind", "key", fill("whole")).reused
        assert (path / "data").read_text() == "whole"
    (path / "data").touch()  # another time, the same content
    assert store.get_or_make("kind", "key", fill("whole")).reused


MAKER = """
import sys, time
from lowrank_lab.artifacts.store import Store
def make(folder):
    (folder / "data").write_text("half")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "data").write_text("whole")
print("reused" if Store(sys.argv[1]).get_or_make("kind", "key", make).reused else "made", flush=True)
"""


def maker(root: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(root), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_9_in_the_middle_is_never_read_and_is_cleaned_up(tmp_path):
    process = maker(tmp_path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    assert store.get("kind", "key") is None
    assert list((tmp_path / "kind").glob(".key.tmp-*")) != []
    assert (store.get_or_make("kind", "key", fill("whole")).path / "data").read_text() == "whole"
    assert list((tmp_path / "kind").glob(".key.tmp-*")) == []


def test_processes_that_want_the_same_key_make_it_once(tmp_path):
    outputs = [p.communicate(timeout=60)[0].split() for p in [maker(tmp_path, 1) for _ in range(4)]]
    assert sorted(output[-1] for output in outputs) == ["made", "reused", "reused", "reused"]


@pytest.mark.parametrize("other", ["is at it", "was faster", "was faster and our folder is there"])
def test_who_has_lost_the_lock_meanwhile_takes_what_the_other_makes(tmp_path, other):
    """As a process that was suspended for longer than its lease: another one has cleared its folder away."""
    others = []

    def lose(folder: Path) -> None:
        if others:
            pytest.fail("it was made here once more")
        (folder / "data").write_text("ours")
        [lease] = folder.parent.glob("*.lease")
        lease.unlink()
        others.append(maker(tmp_path, 2 if other == "is at it" else 0))
        assert others[0].stdout.readline() == "making\n"
        if other != "is at it":
            others[0].wait()
        folder.mkdir() if other.endswith("there") else None
        (folder / "data").write_text("ours")

    found = Store(tmp_path).get_or_make("kind", "key", lose)
    others[0].communicate(timeout=60)
    assert found.reused and (found.path / "data").read_text() == "whole"
    assert [file.name for file in (tmp_path / "kind").iterdir()] == ["key"]


def test_fingerprint_depends_on_content_alone():
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))


def test_file_hash_follows_the_content(tmp_path):
    store = Store(tmp_path / "store")
    file = tmp_path / "file"
    file.write_text("one")
    one = store.file_hash(file)
    assert store.file_hash(file) == one
    time.sleep(0.01)
    file.write_text("two")
    assert store.file_hash(file) != one


def test_write_json_replaces_whole(tmp_path):
    file = tmp_path / "folder" / "record.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in file.parent.iterdir()] == ["record.json"]


def test_a_resumable_artifact_goes_on_in_its_folder_and_counts_all_its_time(tmp_path):
    store = Store(tmp_path)

    def stopped(folder: Path) -> None:
        (folder / "first").write_text("1")
        (folder / ".first.tmp-1").write_text("half")
        (folder / MANIFEST).write_text("a manifest that was written before the folder could be renamed")
        time.sleep(0.2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("kind", "key", stopped, resumable=True)
    assert store.get("kind", "key") is None

    def rest(folder: Path) -> None:
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")

    made = store.get_or_make("kind", "key", rest, resumable=True)
    assert made.seconds >= 0.2
    assert sorted(file.name for file in made.path.iterdir()) == [MANIFEST, "first", "second"]
    assert store.get("kind", "key") is not None, "what was made is found damaged"


def test_json_is_the_same_in_every_locale(tmp_path):
    """A cluster's nodes may have none set, and a model's folder any name."""
    code = (
        "import sys; from lowrank_lab.artifacts.store import write_json; write_json(sys.argv[1], '\\u00e9 \\u2265')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "it.json")], check=True, env=environment)
    assert json.loads((tmp_path / "it.json").read_text(encoding="utf-8")) == "é ≥"
