"""The common part of evaluators that read a text window by window. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells.evaluator import Evaluator

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")


class WindowEvaluator(Evaluator):
    """An evaluator of consecutive windows of a text.

    seqlen       tokens a window; the papers use 2048
    max_windows  only the first so many windows, or None for the whole text
    bos          ``text``: the tokenizer's special tokens once, before the text, as the papers' code does;
                 ``window``: a BOS before every window (models such as Gemma need it)
    batch_size   windows a forward
    dataset      the text, where it is not that of the cell; read by the cell
    """

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

    def windows(self, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """The windows (windows, seqlen) of token ids, and what the protocol says about them.

        Raises SkippedCell where the text is shorter than one.
        """
        ids, text = context.text_tokens()
        bos_id = None if self.bos == "text" else context.bos_id()
        windows = windows_of(ids, self.seqlen, self.max_windows, bos_id)
        available = len(windows_of(ids, self.seqlen, None, bos_id))
        if available == 0:
            raise SkippedCell(f"the text has {len(ids)} tokens, fewer than a window of {self.seqlen}")
        content = self.seqlen if bos_id is None else self.seqlen - 1
        return windows, {
            **text,
            "window": self.seqlen,
            "stride": content,
            "windows": len(windows),
            "windows_available": available,
            "tokens_in_tail_dropped": len(ids) - available * content,
            "bos": self.bos,
        }


def windows_of(ids: np.ndarray, seqlen: int, max_windows: int | None, bos_id: int | None) -> Tensor:
    """Cut a token stream (tokens,) into (windows, seqlen). With ``bos_id`` each window begins with it."""
    content = seqlen if bos_id is None else seqlen - 1
    count = len(ids) // content
    if max_windows is not None:
        count = min(count, max_windows)
    windows = torch.from_numpy(ids[: count * content].reshape(count, content))
    if bos_id is None:
        return windows
    return torch.cat([torch.full((count, 1), bos_id, dtype=windows.dtype), windows], dim=1)
