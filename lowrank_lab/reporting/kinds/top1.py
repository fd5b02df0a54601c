"""Images in the right class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Measured, Section, number


def _describe(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["images"])
    if protocol["images"] < protocol["images_available"]:
        count = f"the first {count} of {protocol['images_available']}"
    size = protocol["processor"].get("crop_size" if protocol["processor"].get("do_center_crop") else "size", {})
    pixels = f" of {size['width']} × {size['height']} pixels" if {"width", "height"} <= size.keys() else ""
    return f"{protocol['dataset']} {protocol['split']}, {count} images{pixels}, {protocol['classes']} classes"


def _cells(measured: Measured) -> dict[str, str]:
    if measured["value"] is None:
        return {"top-1": "nan"}
    error = measured["stderr"]
    return {
        "top-1": f"{measured['value']:.4f} ± {error:.4f}",
        "top-5": number(measured["top5"], "{:.4f}"),
        "loss (nats)": number(measured["mean_nll"]),
    }


TOP1 = Section(
    metric="top-1",
    title="top-1 on",
    must_agree=("dataset", "split", "images", "sha256", "processor"),
    describe=_describe,
    cells=_cells,
    details=lambda measured: {name: measured[name] for name in ("top5", "mean_nll", "stderr") if name in measured},
    ascending=False,
)
