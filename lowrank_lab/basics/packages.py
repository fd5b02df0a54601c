"""Files that installed Python packages ship. The packages are never imported."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path


@cache  # a package may have thousands of files, and every cell asks
def file_of(package: str, name: str) -> Path | None:
    """The file of this name in a package; None where there is no such package or no such file."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)
