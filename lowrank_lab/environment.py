"""What a record says of the machine and the software. No torch unless it is loaded already."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_lab import __version__

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "lm_eval",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
)
MIB = 1024**2


def versions() -> dict[str, str]:
    found = {"lowrank_lab": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def git() -> dict[str, Any]:
    """Commit and dirty flag of this checkout; None where it is not a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def hardware(device: Any) -> dict[str, Any]:
    """``device`` is a torch.device."""
    facts = {
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": _total_memory() // MIB,
    }
    if device.type == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_mib"] = torch.cuda.get_device_properties(device).total_memory // MIB
    return facts


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory. Linux only; elsewhere it is of the process's whole life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Peak memory in MiB since ``reset_peak_memory``: resident set of the process, and GPU allocations."""
    peak = {"resident_mib": _peak_resident() // MIB}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() // MIB
    return peak


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
