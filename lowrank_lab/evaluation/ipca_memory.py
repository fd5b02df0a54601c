"""The memory of PCA against incremental PCA (Dobi-SVD, §4.2.2, Figure 3 right)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.lowrank.refinement.ipca import leading_directions, merge
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.evaluation import tensor_memory
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    tensor_memory = LazyModule("lowrank_lab.evaluation.tensor_memory")


class IpcaMemory(Evaluator):
    """The peak memory while ``samples`` sets of directions are reduced to one.

    The directions of a sample are random orthonormal V_i (n, k) in float64, drawn one after the other, as
    calibration gives them. The number does not depend on the model; it is in the record of a dense one. The value
    is PCA's number over IPCA's at the largest width.

    widths   n, the width of an n × n matrix
    samples  how many V_i (paper: 256)
    share    k / n
    """

    version = versions.IPCA_MEMORY
    component = "IPCA_MEMORY"
    no_influence = ()
    models = ("dense",)

    def __init__(self, widths: list[int], samples: int, share: float) -> None:
        if not isinstance(widths, list) or not widths or not all(checks.is_count(width, 2) for width in widths):
            raise ValueError(f"widths={widths} is not valid; it must be a list of whole numbers from 2")
        checks.whole(2, samples=samples)
        if not checks.is_number(share) or not 0 < share < 1:
            raise ValueError(f"share={share} is not valid; it must be a number between 0 and 1")
        self.widths = sorted(widths)
        self.samples = samples
        self.share = share

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, and ``points``, by width and way the peak in ``bytes``."""
        points, last = [], {}
        for width in progress.track(self.widths, "memory", "width"):
            rank = max(1, round(self.share * width))
            sample = directions(width, rank, context.device)
            last = {
                name: tensor_memory.peak_bytes(partial(run, sample, self.samples, rank))
                for name, run in WAYS.items()
            }
            points += [{"width": width, "rank": rank, "way": name, "bytes": peak} for name, peak in last.items()]
        return {
            "metric": "memory of PCA over IPCA",
            "value": last["PCA"] / last["IPCA"],
            "points": points,
            "protocol": {
                "samples": self.samples,
                "share": self.share,
                "counted": "tensors alive at once, op by op; without the workspace within a kernel",
            },
        }


def directions(width: int, rank: int, device: Any) -> Callable[[int], Tensor]:
    """A function that draws V_i (width, rank), orthonormal in float64, of sample i."""

    def of_sample(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator).to(device))[0]

    return of_sample


def pca(sample: Callable[[int], Tensor], samples: int, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors (n, rank) of [V_1, …, V_samples], stored as one matrix."""
    first = sample(0)
    together = first.new_empty(first.shape[0], samples * rank)
    for number in range(samples):
        together[:, number * rank : (number + 1) * rank] = sample(number)
    return leading_directions(together, rank)


def pca_of_gram(sample: Callable[[int], Tensor], samples: int, rank: int) -> Tensor:
    """The same (n, rank), from the sum of V_i V_iᵀ, which is n × n however many samples there are."""
    first = sample(0)
    gram = first.new_zeros(first.shape[0], first.shape[0])
    for number in range(samples):
        v = sample(number)
        gram.addmm_(v, v.T)
    return torch.linalg.eigh(gram)[1][:, -rank:].flip(1)


def ipca(sample: Callable[[int], Tensor], samples: int, rank: int) -> Tensor:
    """Algorithm 2's directions (n, rank), merged as in refinement/ipca.py."""
    v = sample(0)
    for number in range(1, samples):
        v = merge(v, sample(number), number + 1, rank)
    return v


WAYS = {
    "PCA": pca,
    "PCA of the summed Gram matrices": pca_of_gram,
    "IPCA": ipca,
}
