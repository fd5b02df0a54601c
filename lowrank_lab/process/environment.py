"""Facts about the machine and the software for records. Torch is used only if it is loaded already."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
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
    "bitsandbytes",
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
    root = Path(__file__).resolve().parents[2]

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
        "cores": cores(),
        "memory_mib": _total_memory() // MIB,
    }
    if device.type == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_memory_mib"] = torch.cuda.get_device_properties(device).total_memory // MIB
    return facts


def machine() -> dict[str, Any]:
    """Facts about the machine that a timing depends on. No torch."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "gpus": list(_gpu_names()),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


_peaks_before: dict[str, int] = {}  # MiB: the peaks before ``memory_on_top`` reset them


def machine_with(device: str) -> dict[str, Any]:
    """The machine and the kind of device that a time measured here depends on; ``device`` may be auto."""
    here = machine()
    return {**here, "device": ("cuda" if here["gpus"] else "cpu") if device == "auto" else device}


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory. Only on Linux; elsewhere it covers the whole life of the process."""
    _peaks_before.clear()
    _reset_peaks()


def peak_memory() -> dict[str, int]:
    """Peak memory in MiB since ``reset_peak_memory``: resident set of the process, and GPU allocations."""
    peak = {"resident_mib": _peak_resident() // MIB}
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() // MIB
    return {name: max(mib, _peaks_before.get(name, 0)) for name, mib in peak.items()}


def memory_on_top(work: Callable[[], Any], device: Any) -> int | None:
    """The peak memory of ``work()`` in bytes, in addition to the memory in use before it.

    On a GPU (``device`` is a torch.device) it is the memory that torch allocates there, else the resident memory of
    the process; None where the system does not report it. The peak since ``reset_peak_memory`` is not lost.
    """
    import torch

    _peaks_before.update(peak_memory())
    gc.collect()
    if device.type == "cuda":
        _reset_peaks()
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # glibc: return freed memory, or its reuse would not be seen
        ctypes.CDLL(None).malloc_trim(0)
    resettable = _reset_peaks()
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before if resettable else None


def _reset_peaks() -> bool:
    """Whether the peak of the resident set could be reset."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak_resident() -> int:
    if peak := _status("VmHWM"):
        return peak
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def memory_limit() -> int:
    """Bytes of memory that this process may use: that of the machine, or the limit of its control group (SLURM)."""
    limit = _total_memory()
    with contextlib.suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        for parent in (folder, *folder.parents):  # the lowest limit of all groups that it is in
            file = parent / "memory.max"
            if file.exists() and (text := file.read_text().strip()) != "max":
                limit = min(limit, int(text))
    return limit


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int | None:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def _gpu_names() -> tuple[str, ...]:
    """The names of the NVIDIA GPUs of this machine, in order; none without a driver."""
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(done.stdout.splitlines())


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
