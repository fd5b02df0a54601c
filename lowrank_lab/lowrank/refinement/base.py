"""What a refinement is given and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lowrank_lab.modules.site import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Refinement(Protocol):
    """Better factors than the closed form's, of the same ranks.

    ``needs_calibration`` says that it reads calibration tokens, whatever the metric does. A refinement whose config
    has a ``dataset`` is given windows of that text as well, as ``context.text_ids("refinement")``; its config
    then also has ``samples``, ``seqlen``, ``seed``, ``sampling`` and ``bos``.
    """

    needs_calibration: bool

    def prepare(self, context: Context) -> None:
        """Ask the context for the artifacts that will be needed, so that their seconds are their own."""
        ...

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Write the factors of every site that ``ranks`` gives a rank, with ``factors.save_factors``.

        ``folder`` survives an interruption, and the next call is given what this one wrote: a file must be whole or
        absent, and what only serves to go on must be gone at the end. ``facts.json``, if it is written, goes into
        the record.
        """
        ...
