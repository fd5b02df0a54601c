"""The ``eval=ppl`` evaluator: its protocol as data. perplexity.py, which needs torch, computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab import checks, versions
from lowrank_lab.errors import SkippedCell
from lowrank_lab.evaluation.base import Evaluator

if TYPE_CHECKING:
    from lowrank_lab.bench import Bench


class Perplexity(Evaluator):
    """Perplexity on a text.

    seqlen       tokens a window; the papers use 2048
    max_windows  only the first so many windows, or None for the whole text
    bos          ``text``: the tokenizer's special tokens once, before the text, as the papers' code does;
                 ``window``: a BOS before every window (models such as Gemma need it)
    dataset      the text, where it is not that of the cell; read by the cell
    """

    version = versions.PERPLEXITY
    reads_text = True

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        batch_size: int,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        checks.whole(2, seqlen=seqlen)
        checks.whole(1, batch_size=batch_size)
        checks.whole(1, optional=True, max_windows=max_windows)
        checks.one_of(("text", "window"), bos=bos)
        self.seqlen = seqlen
        self.max_windows = max_windows
        self.bos = bos
        self.batch_size = batch_size

        self.add_special_tokens = bos == "text"

    def __call__(self, bench: Bench, part: str) -> dict[str, Any]:
        """Measure it: the value and its protocol."""
        from lowrank_lab.evaluation.perplexity import perplexity, windows_of

        ids, text = bench.text_tokens()
        bos_id = None if self.bos == "text" else bench.bos_id()
        windows = windows_of(ids, self.seqlen, self.max_windows, bos_id)
        available = len(windows_of(ids, self.seqlen, None, bos_id))
        if available == 0:
            raise SkippedCell(f"the text has {len(ids)} tokens, fewer than a window of {self.seqlen}")
        measured = perplexity(bench.model, windows, self.batch_size, bench.device)
        content = self.seqlen if bos_id is None else self.seqlen - 1
        protocol = {
            **text,
            "window": self.seqlen,
            "stride": content,
            "windows": len(windows),
            "windows_available": available,
            "tokens_in_tail_dropped": len(ids) - available * content,
            "bos": self.bos,
            "loss": "token mean, float32",
        }
        return {"metric": "perplexity", **measured, "protocol": protocol}
