"""Which commit of the hub a name stands for. No torch.

It is asked once a name and without retries. Where the hub cannot be reached, or what answers is a proxy or a hub
that is down, the process stays offline from then on: what is in the local cache works, and nothing else waits.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Literal

TIMEOUT = 10.0  # seconds
IN_EVERY = {"model": "config.json", "dataset": "README.md"}  # a file that the cache has of each


@cache
def hub_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
    """The commit of a model or data set: from the hub, or from the local cache where the hub does not tell.

    Raises what the hub's client raises where neither knows it: many kinds of errors.
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
        cached = try_to_load_from_cache(name, IN_EVERY[kind], repo_type=kind, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name  # the cache keeps each file below snapshots/<commit>/
        raise


def _is_answer(error: Exception) -> bool:
    """Whether it is the hub that says so, and not a proxy, nor a hub that is down."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, ValueError)
    status, headers = error.response.status_code, error.response.headers
    if status == 403:  # as many proxies say it; the hub gives a number or a code with it
        return "x-error-code" in headers or "x-request-id" in headers
    return status != 407 and status < 500


def _stay_offline() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
