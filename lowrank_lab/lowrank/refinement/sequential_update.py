"""SVD-LLM's layer-wise closed-form update: the left factors, fitted to the inputs of the compressed model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.modules.site import by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.calibration import statistics
    from lowrank_lab.lowrank import factors, solver, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.modules import factorized
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    statistics = LazyModule("lowrank_lab.calibration.statistics")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    solver = LazyModule("lowrank_lab.lowrank.solver")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    factorized = LazyModule("lowrank_lab.modules.factorized")

# Fraction of the largest below which a direction of C', which is summed in float32, is rounding.
RESOLUTION = 1e-6


class SequentialUpdate:
    """Refit left to W x' with right unchanged, block after block; x' are inputs from the compressed blocks before.

    SVD-LLM (Wang et al., arXiv 2403.07378, v1) §3.2: U' = W X' Dᵀ (D Dᵀ)⁻¹ with D = V Σ^½ X'. As in its code, the
    inputs of all linears of a block are those of the dense block on the compressed prefix, and W x' is the target
    for these inputs x' themselves, not the dense model's output. A metric on the output side (fisher_kron) changes
    nothing: the best left for a given right is the same under every R.

    Later blocks are given inputs from the refined factors before the storage rounds them (remap).
    """

    needs_calibration = True

    def prepare(self, context: Context) -> None:
        _ = context.calibration

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Raises FloatingPointError, naming the site, where its input or a factor is not finite."""
        tower, device, decomposed = context.tower, context.device, artifacts.spectra(context)
        model = context.take_model()
        block_sites = by_block(context.sites, len(walk.blocks_of(model, tower)))
        blocks = context.walk(model)
        for index, block, run in progress.track(blocks, "update", "block", len(block_sites)):
            ranked = {
                name: (site, k) for name, site in block_sites[index].items() if (k := ranks[name]) is not None
            }
            if not (folder / walk.block_file(index)).exists():
                input_of = {linear: group[0] for group in tower.inputs for linear in group}
                linears = dict.fromkeys(input_of[site.members[0]] for site, _ in ranked.values())
                inputs = statistics.gather(block, linears, partial(run, advance=False), device)
                refitted = {}
                for name, (site, rank) in ranked.items():
                    weight = factorized.site_weight(block, site).to(device).double()
                    left, right, _ = spectra.load_spectrum(decomposed, site, device).factors(weight, rank)
                    second_moment = inputs[input_of[site.members[0]]].second_moment()
                    if not second_moment.isfinite().all():
                        raise FloatingPointError(
                            f"{name}: its input is not finite once earlier blocks are compressed"
                        )
                    left = refit_left(weight, left, right, second_moment)
                    spectra.check_finite(name, left, right)
                    refitted[site.key] = left, right
                factors.save_factors(folder, index, refitted)
            # From the file also where it was just written, so that a run that was interrupted ends in the same
            # numbers as one that was not.
            for site, _ in ranked.values():
                factorized.factorize(block, site, *factors.load_factors(folder, site))
            run()


def refit_left(weight: Tensor, left: Tensor, right: Tensor, second_moment: Tensor) -> Tensor:
    """The left' that minimises ‖(W − left' · right) C^½‖_F, and of all these the one nearest to ``left``.

    ``weight`` W (out, in), ``left`` (out, k), ``right`` (k, in), ``second_moment`` C (in, in), all float64; returns
    (out, k), float64. Where G = right C rightᵀ is regular this is W C rightᵀ G⁻¹, whatever ``left`` is. Directions
    without inputs in C (few tokens, dead channels) stay as in ``left``.
    """
    # Rounding in a sum of x xᵀ is relative to the two channels of each entry. So this computes G for
    # inputs scaled to unit size, where rounding is the same everywhere, in an orthonormal basis of the row space of
    # right. In the unscaled G one channel a thousand times larger than the others, as language models have, would
    # hide the rest.
    size = second_moment.diagonal().sqrt()
    unit = torch.where(size > 0, size, torch.ones_like(size))
    correlation = second_moment / unit / unit.unsqueeze(-1)
    q, triangle = torch.linalg.qr((right * size).T)
    u, sigma, vt = torch.linalg.svd(triangle)
    passed = sigma > solver.NOISE * sigma[0]
    q, to_latent = q @ u[:, passed], vt[passed] / sigma[passed].unsqueeze(-1)  # right · size = vtᵀ σ (q u)ᵀ
    values, vectors = torch.linalg.eigh(q.T @ correlation @ q)
    kept = values > RESOLUTION * values[-1:]
    vectors = vectors[:, kept]
    residual = ((weight - left @ right) * unit) @ (correlation @ (q @ vectors))
    return left + (residual / values[kept]) @ (vectors.T @ to_latent)
