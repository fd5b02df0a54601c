"""Dobi-SVD's weight update: the subspace of the activations, by incremental PCA over the calibration samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.modules.site import by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.lowrank import factors, solver, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.modules import factorized
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    solver = LazyModule("lowrank_lab.lowrank.solver")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    factorized = LazyModule("lowrank_lab.modules.factorized")


class Ipca:
    """W̃ = V Vᵀ W, with V the k directions that the samples' activations A_i = x_i Wᵀ have most in common.

    Dobi-SVD (papers/003) §3.2, A.4.1, Algorithm 2 (written for A = x W there, with W V Gₖ Vᵀ). Each sample is one
    sequence of calibration text. The activations are those of the dense model: each position is updated
    "independently" (A.3), and the paper does not say that the earlier ones are truncated. The bias is no part of
    them, as the factors replace W alone.

    samples   how many of the calibration samples are used, in their order; null is all. The paper takes 256.
    """

    needs_calibration = True

    def __init__(self, samples: int | None) -> None:
        checks.whole(1, optional=True, samples=samples)
        self.samples = samples

    def prepare(self, context: Context) -> None:
        _ = context.calibration

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Raises FloatingPointError, naming the site, where an activation is not finite."""
        tower, device = context.tower, context.device
        length = context.calibration_positions // walk.count_of(context.calibration)
        sites = by_block(context.sites, len(walk.blocks_of(context.model, tower)))
        blocks = context.walk(context.model, self.samples)
        for index, block, run in progress.track(blocks, "IPCA", "block", len(sites)):
            if (folder / walk.block_file(index)).exists():
                run()
                continue
            updates = {}
            hooks = []
            for name, site in sites[index].items():
                if (rank := ranks[name]) is None:
                    continue
                weight = factorized.site_weight(block, site).to(device).double()
                updates[site.key] = update = Update(name, weight, rank)
                linear = block.get_submodule(site.members[0])  # all members share the input
                hooks.append(linear.register_forward_pre_hook(partial(_add_batch, update, length)))
            run()
            for hook in hooks:
                hook.remove()
            factors.save_factors(folder, index, {key: update.factors() for key, update in updates.items()})


def _add_batch(update: Update, length: int, _: object, args: tuple[Tensor, ...]) -> None:
    # Some blocks flatten sequences before a linear.
    for sample in args[0].reshape(-1, length, args[0].shape[-1]):
        update.add(sample)


class Update:
    """Algorithm 2 for one site: ``weight`` W (out, in) float64, and ``rank`` k.

    All directions lie in the column space of W. Where W is taller than wide they are coordinates in an orthonormal
    basis Q of it, V = Q · directions, so that nothing is wider than p = min(out, in).
    """

    def __init__(self, name: str, weight: Tensor, rank: int) -> None:
        self.name = name
        self.rank = rank
        self.count = 0
        out, inp = weight.shape
        self.q: Tensor | None = None
        self.weight = weight
        if out > inp:
            self.q, self.weight = torch.linalg.qr(weight)
        self.directions = self.weight[:, :0]  # (p, ≤ k), orthonormal

    def add(self, inputs: Tensor) -> None:
        """One sample x_i (tokens, in); lines 5-10 of Algorithm 2."""
        self.count += 1
        activations = inputs.detach().double() @ self.weight.T
        if not activations.isfinite().all():
            raise FloatingPointError(f"{self.name}: an activation is not finite during calibration")
        found = right_singular_vectors(activations, self.rank)
        self.directions = found if self.count == 1 else merge(self.directions, found, self.count, self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``left`` V (out, k) and ``right`` Vᵀ W (k, in), float64; line 11."""
        v = complete(self.directions, self.weight, self.rank)
        return (v if self.q is None else self.q @ v), v.T @ self.weight


def merge(old: Tensor, new: Tensor, number: int, rank: int) -> Tensor:
    """Lines 6-9 of Algorithm 2: V_old (p, ≤ k) after sample ``number`` i ≥ 2, whose V_i is ``new`` (p, ≤ k).

    Where the algorithm leaves something open, this function does the following:

    - Line 6 centres V_i by μ + (V_i − μ)/i, and no line changes μ from the 0 of line 4. Taken literally this scales
      V_i by 1 − 1/i, and this function does so. A running mean of the V_i would have no meaning: the sign of every
      singular vector is arbitrary, and A.4.1 derives max Σ ‖Vᵀ V_i‖², without a mean.
    - V_i has the first k right singular vectors: with all of them V_i V_iᵀ is the identity and carries no
      information, and A.4.1 needs ‖V_i V_iᵀ‖² = k. Their singular values are not used, so a sample's k-th direction
      counts as much as its first.
    - V_new = [V_old, V_i] is two sets of columns in the output space, so the directions there are its *left*
      singular vectors; ``V'[:k]`` of lines 8 and 9 is read as the first k of these.
    - V_old is orthonormal again after line 9 and carries no singular values: it stands for i − 1 samples with the
      weight of one, so that late samples count for more. This is the algorithm; a true PCA over all V_i would keep
      Σ V_i V_iᵀ, or the singular values along with V_old.
    """
    shrink = 1 - 1 / number
    if old.shape[1] == new.shape[1] == rank:
        return _between(old, new, shrink)
    return leading_directions(torch.cat([old, shrink * new], 1), rank)


def _between(old: Tensor, new: Tensor, shrink: float) -> Tensor:
    """The first k left singular vectors, in some basis of their span, of [old, shrink · new], both (p, k).

    For orthonormal ``old`` and ``new`` and shrink < 1, from a k wide eigendecomposition instead of a 2k wide one:
    each principal pair (a, b) of the two subspaces, a · b = c, spans a separate plane, in which the Gram matrix
    [[1, s c], [s c, s²]] has one eigenvalue λ ≥ 1 and one below. The first k are those λ, their vectors
    (λ − s²) a + s² c b, and the k of them are a · diag(λ − s²) + s² · new newᵀ a.
    """
    m = new.T @ old
    cosines2, pairs = torch.linalg.eigh(m.T @ m)
    s2 = shrink**2
    # λ − s², at least 1 − s²: no pair vanishes.
    of_old = (1 - s2 + ((1 - s2) ** 2 + 4 * s2 * cosines2.clamp(min=0)).sqrt()) / 2
    return torch.linalg.qr((old @ pairs) * of_old + s2 * (new @ (m @ pairs)))[0]


def right_singular_vectors(activations: Tensor, count: int) -> Tensor:
    """The first ``count`` right singular vectors (out, ≤ count) of ``activations`` (tokens, out); float64.

    Fewer where its rank is lower.
    """
    return leading_directions(activations.T, count)


def leading_directions(columns: Tensor, count: int) -> Tensor:
    """The first ``count`` left singular vectors (p, ≤ count) of ``columns`` (p, n); float64.

    From the smaller Gram matrix, many times faster than a singular value decomposition. It squares the singular
    values, so those below 10⁻⁶ of the largest cannot be distinguished from zero and get no vector; activations come
    in float32 and are hardly more precise.
    """
    p, n = columns.shape
    if n == 0:
        return columns
    if p <= n:
        values, vectors = torch.linalg.eigh(columns @ columns.T)
        return vectors[:, values > solver.NOISE * values[-1]][:, -count:].flip(1)
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    kept = vectors[:, values > solver.NOISE * values[-1]][:, -count:].flip(1)
    # Orthonormal by QR, not by dividing by the singular values: small ones magnify the rounding of the eigh.
    return torch.linalg.qr(columns @ kept)[0]


def complete(directions: Tensor, weight: Tensor, rank: int) -> Tensor:
    """``directions`` (p, r) orthonormal with r ≤ k, filled up to ``rank`` k columns.

    Where all samples together have fewer than k directions, the other columns go to what the update would otherwise
    lose of ``weight`` (p, in) itself, as the solver spends rank that its metric does not need.
    """
    missing = rank - directions.shape[1]
    if missing <= 0:
        return directions
    rest = weight - directions @ (directions.T @ weight)
    gram = rest @ rest.T
    # Existing directions get eigenvalues below all others, also where W has no more than these.
    gram -= (1 + gram.trace()) * directions @ directions.T
    _, vectors = torch.linalg.eigh(gram)
    return torch.cat([directions, vectors[:, -missing:].flip(1)], 1)
