"""The interface of a refinement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lowrank_lab.lowrank.ranks import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Refinement(Protocol):
    """Better factors than the closed form's, of the same ranks.

    ``needs_calibration`` says that it reads calibration tokens, whatever the metric does. A refinement whose config
    has a ``dataset`` can read windows of that text as well, by ``context.text("refinement")``; its config
    then also has ``samples``, ``seqlen``, ``seed``, ``sampling`` and ``bos``.
    """

    needs_calibration: bool
    # products: bool, False where it is left out: whether it can adjust products within heads, too.

    def prepare(self, context: Context) -> None:
        """Ask the context for the artifacts that it needs, so that their time does not count to its own."""
        ...

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Write the factors of every site that ``ranks`` gives a rank, with ``factors.save_factors``.

        A refinement that trains other parameters too writes these with ``factors.save_trained_parameters``.

        ``folder`` survives an interruption, and the next call finds the files of this one: each must be complete or
        absent. Files that only serve to resume must be removed at the end. The record includes ``facts.json``, if
        there is one.
        """
        ...
