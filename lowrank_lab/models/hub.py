"""The commit of the hub that a name refers to. No torch.

The process sends one request for each name, without retries. Where the hub cannot be reached, or where the answer
comes from a proxy or a hub that is down, the process stays offline from then on: the local cache works, and no
other request waits.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

from lowrank_lab.basics.errors import UserError

TIMEOUT = 10.0  # seconds
CACHED_FILE = {
    "model": "config.json",
    "dataset": "README.md",
}  # a file of each kind of repository that the cache has


@cache
def hub_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """The commit of a model or data set: from the hub, or from the local cache where the hub does not answer.

    Raises the errors of the hub's client, of many kinds, where neither knows it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        commit = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT).sha
        if commit is None:
            raise ValueError("the hub gave no commit")
        return commit
    except Exception as error:
        if not _is_answer(error):
            _stay_offline()
        cached = try_to_load_from_cache(name, CACHED_FILE[kind], repo_type=kind, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name  # the cache keeps each file below snapshots/<commit>/
        raise


def data_not_there(dataset: str, error: Exception, mirror: str) -> UserError:
    """What to do about a data set that the hub's client did not find; ``mirror`` is its place below data_root."""
    return UserError(
        f"data set {dataset}: neither on the hub nor in its local cache ({type(error).__name__}); check the "
        f"network, or set data_root to a folder that holds {mirror}"
    )


def _is_answer(error: Exception) -> bool:
    """Whether the error is an answer of the hub, and not of a proxy or a hub that is down."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, ValueError)
    status, headers = error.response.status_code, error.response.headers
    if status == 403:  # many proxies answer so; the hub adds a request id or a code
        return "x-error-code" in headers or "x-request-id" in headers
    return status != 407 and status < 500


def _stay_offline() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
