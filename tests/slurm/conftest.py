"""The one-node SLURM that the tests of this folder share; they are skipped where there can be none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import COMMANDS, Cluster


@pytest.fixture
def cluster(daemons: Cluster) -> Iterator[Cluster]:
    """A SLURM without jobs."""
    yield daemons
    daemons.cancel_all()


@pytest.fixture(scope="session")
def daemons() -> Iterator[Cluster]:
    if not Path("/etc/debian_version").exists() or os.geteuid() != 0:
        pytest.skip("brings up Debian's SLURM as root")
    if lacking := [command for command in COMMANDS if shutil.which(command) is None]:
        pytest.skip(f"no {', '.join(lacking)}; make test-slurm installs them")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for sockets
    cluster = Cluster(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    shutil.rmtree(root)
