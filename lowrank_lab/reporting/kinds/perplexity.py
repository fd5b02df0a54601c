"""Perplexities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Section, number

OF_WINDOWS = ("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos")
JOINS = {"\n\n": "blank lines", " ": "spaces"}


def describe_windows(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    documents = f"{protocol['documents']} documents joined by {JOINS.get(protocol['join'], repr(protocol['join']))}"
    return f"{protocol['dataset']} {protocol['split']}, {documents}, {windows}{bos}"


PERPLEXITY = Section(
    metric="perplexity",
    title="perplexity on",
    must_agree=OF_WINDOWS,
    describe=describe_windows,
    cells=lambda measured: {"perplexity": number(measured["value"])},
    alike=True,
)
