"""The format of the inputs of linears. No torch."""

from __future__ import annotations

from typing import Literal

from lowrank_lab.basics import checks
from lowrank_lab.modules.formats import Format


class Activations:
    """Inputs of linears rounded to 2^bits evenly spaced values.

    symmetric    around zero, or with a zero point
    granularity  ``token``: each has a scale; a number: each group of so many channels of a token has one;
                 ``tensor``: one scale for all, fixed on the calibration text. (A new scale for every batch would
                 make numbers depend on the batch size.)
    """

    def __init__(self, bits: int, symmetric: bool, granularity: Literal["token", "tensor"] | int) -> None:
        checks.flag(symmetric=symmetric)
        if granularity not in ("token", "tensor"):
            checks.whole(1, granularity=granularity)
        self.static = granularity == "tensor"
        self.form = Format(
            bits, "integer", symmetric, "channel" if granularity == "token" else granularity, "float32"
        )

    @property
    def label(self) -> str:
        of = self.form.granularity
        parts = [f"A{self.form.bits}", "" if self.form.symmetric else "asym"]
        parts.append({"channel": "", "tensor": "static"}.get(str(of), f"g{of}"))
        return " ".join(part for part in parts if part)
