"""The hub that cannot be reached: one line, soon, and what is cached still works."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.evaluation import task_data
from lowrank_lab.evaluation.tasks import Leaf
from lowrank_lab.models import hub, source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has asked the hub nothing yet; the time limit is shorter."""
    forget = (hub.hub_commit, source._hub, task_data._commit)
    for remembered in forget:
        remembered.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    yield
    for remembered in forget:
        remembered.cache_clear()


@pytest.fixture(params=["closed", "silent"])
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub behind a port that is closed, or that accepts and never answers; the latter may be asked once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        if request.param == "closed":
            server.close()
            yield
            return
        yield
        server.settimeout(0)
        connections = []
        while True:
            try:
                connections.append(server.accept())
            except BlockingIOError:
                break
        assert len(connections) <= 1, "the hub was asked again"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.path=facebook/opt-125m", "model.path=facebook/opt-125m: neither on the hub nor in its local cache"),
        ("data_root=null", "data set Salesforce/wikitext: neither on the hub nor in its local cache"),
    ],
)
def test_is_one_line_and_asked_once(lab, nowhere, overrides, message):
    for _ in range(2):  # as for two cells of a grid
        with pytest.raises(UserError, match=message) as error:
            lab.cells("method=dense", *overrides.split())
        assert "\n" not in str(error.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_so_it_is_for_the_data_of_tasks(lab, nowhere):
    boolq = Leaf("aps/super_glue", "boolq", {}, {}, "validation", None, None)
    for _ in range(2):
        with pytest.raises(UserError, match="task boolq: data set aps/super_glue is neither on the hub nor in its"):
            task_data.find("boolq", boolq, 0, None, Store(lab.root))


def test_a_model_in_the_cache_is_found_and_runs(lab, nowhere, monkeypatch, tmp_path, checkpoints):
    """Also where files that a model need not have were never asked for, which the client would look for again."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--me--tiny" / "snapshots" / COMMIT
    shutil.copytree(checkpoints["llama"], snapshot)
    (cache / "models--me--tiny" / "refs").mkdir()
    (cache / "models--me--tiny" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    record = lab.run("model.path=me/tiny", "method=dense")
    assert record["content"]["revision"] == COMMIT
    by_folder = lab.run(f"model.path={checkpoints['llama']}", "method=dense")
    assert record["metrics"]["ppl"]["value"] == by_folder["metrics"]["ppl"]["value"]


def test_a_revision_that_the_cache_has_not_is_not_taken_for_another(
    lab, nowhere, monkeypatch, tmp_path, checkpoints
):
    shutil.copytree(checkpoints["llama"], tmp_path / "models--me--tiny" / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="neither on the hub nor in its local cache"):
        lab.cells("model.path=me/tiny", f"model.revision={COMMIT[::-1]}", "method=dense")


@pytest.mark.parametrize(
    ("status", "headers", "answer"),
    [
        (404, {}, True),
        (401, {}, True),
        (403, {"x-error-code": "GatedRepo"}, True),
        (403, {"x-request-id": "Root=1-2"}, True),
        (403, {}, False),
        (407, {}, False),
        (500, {}, False),
        (503, {"x-request-id": "Root=1-2"}, False),
    ],
)
def test_only_an_answer_of_the_hub_does_not_end_the_asking(monkeypatch, status, headers, answer):
    """Through the client itself; the next name is not asked where a proxy stands in the way."""
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.extend(path for path in [self.path] if path.startswith("/api/models/"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub, "TIMEOUT", 10.0)
        for name in ("me/none", "me/other"):
            with pytest.raises(UserError):
                source.resolve(name, None, None)  # type: ignore[arg-type]
        server.shutdown()
    assert len(asked) == (2 if answer else 1)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is not answer
