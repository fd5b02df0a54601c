"""Descriptions of checkpoints of versions 1 to 3, as the present version writes them. No torch.

They do not list modules, but the sites with their ranks and one storage for all of them, the linears in few bits,
and the steps before linears. Version 1 has no linears in few bits, version 2 no steps and no KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READABLE = (1, 2, 3)
STORAGES = ("factors", "remap")

Modules = dict[str, dict[str, Any]]


def converted(data: Mapping[str, Any]) -> dict[str, Any]:
    """The description ``data`` in version 4. Raises KeyError, TypeError or ValueError for damaged data."""
    if data["storage"] not in STORAGES:
        raise ValueError(f"storage {data['storage']}")
    sites = [{**site, "cost": _cost(site)} for site in data["sites"]]
    quantized, steps, final = data.get("quantized", {}), data.get("steps", {}), data.get("final", [])
    kv_cache = data.get("kv_cache")
    modules: Modules = {}
    for site in sites:
        if site["rank"] is not None:
            modules.update(_factors(site, data["storage"]))
    blocks = sites[0]["name"].removesuffix(f".{sites[0]['block']}.{'+'.join(sites[0]['members'])}") if sites else ""
    for paths, description in steps.items():
        modules.update(_steps([f"{blocks}.{path}" for path in paths.split(",")], description))
    if final:  # only models whose last norm is next to the blocks have it
        modules[f"{blocks.rpartition('.')[0]}.norm"] = {"kind": "norm_with_steps", "steps": final}
    for path, form in quantized.items():
        modules[f"{blocks}.{path}"] = {"kind": "quantized", "format": form}
    online = bool(steps or final) or kv_cache is not None
    return {
        "method": data["method"],
        "ratio": data["ratio"],
        "sites": sites,
        "modules": modules,
        "quantized": bool(quantized) or online,
        "online": online,
        "kv_cache": kv_cache,
    }


def _cost(site: Mapping[str, Any]) -> int:
    return int(site["dense"] if site["rank"] is None else site["rank"] * site["per_rank"])


def _factors(site: Mapping[str, Any], storage: str) -> Modules:
    """The modules of a site that has a rank."""
    modules: Modules = {}
    prefix = site["name"].removesuffix("+".join(site["members"]))
    paths = [f"{prefix}{member}" for member in site["members"]]
    right, full = f"{paths[0]}.right", min(sum(site["outs"]), site["inp"])
    first = 0
    for path, out in zip(paths, site["outs"], strict=True):
        modules[path] = {"kind": "factorized", "rank": site["rank"]}
        if path != paths[0]:
            modules[path]["borrows"] = {"right": right}
        if storage == "remap":  # of the outputs of the site, the first ``full`` are in 8 bits
            in_8_bit = max(0, min(full, first + out) - first)
            modules[f"{path}.left"] = {"kind": "mixed", "side": "left", "in_8_bit": in_8_bit}
        first += out
    if len(paths) > 1:
        modules[right] = {"kind": "shared", "users": len(paths)}
    if storage == "remap":
        inner = f"{right}.linear" if len(paths) > 1 else right
        modules[inner] = {"kind": "mixed", "side": "right", "in_8_bit": full}
    return modules


def _steps(paths: list[str], description: list[dict[str, Any]]) -> Modules:
    """The modules of linears at ``paths`` with the same steps before them."""
    modules: Modules = {path: {"kind": "prepared", "steps": []} for path in paths}
    modules[paths[0]]["steps"] = description
    for path in paths[1:]:
        modules[path]["borrows"] = {"prepare": f"{paths[0]}.prepare"}
    if len(paths) > 1:
        modules[f"{paths[0]}.prepare"] = {"kind": "shared", "users": len(paths)}
    return modules
