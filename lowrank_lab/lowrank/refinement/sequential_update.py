"""SVD-LLM's layer-wise closed-form update: the left factors, fitted to what the compressed model feeds them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.modules.site import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.running.context import Context

# Fraction of the largest below which a direction of C', which is summed in float32, is rounding.
RESOLUTION = 1e-6


class SequentialUpdate:
    """Refit left to W x' with right kept, block after block, where x' comes from the blocks compressed before.

    SVD-LLM (Wang et al., arXiv 2403.07378, v1) §3.2: U' = W X' Dᵀ (D Dᵀ)⁻¹ with D = V Σ^½ X'. As in its code, the
    inputs of all linears of a block are those of the dense block on the compressed prefix, and W x' is the target
    for these inputs x' themselves, not the dense model's output. A metric on the output side (fisher_kron) changes
    nothing: the best left for a given right is the same under every R.

    Later blocks see the refined factors as they are here, before the storage rounds them (remap).
    """

    needs_calibration = True

    def prepare(self, context: Context) -> None:
        _ = context.calibration_ids

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Raises FloatingPointError, naming the site, where its input or a factor is not finite."""
        from lowrank_lab import progress
        from lowrank_lab.calibration.statistics import gather
        from lowrank_lab.lowrank.factors import load_factors, save_factors
        from lowrank_lab.lowrank.spectra import check_finite, load_spectrum
        from lowrank_lab.models.walk import block_file, blocks_of
        from lowrank_lab.modules.factorized import factorize, site_weight
        from lowrank_lab.modules.site import by_block

        tower, device, made = context.tower, context.device, spectra(context)
        model = context.take_model()
        sites = by_block(context.sites, len(blocks_of(model, tower)))
        blocks = context.walk(model)
        for index, block, run in progress.track(blocks, "update", "block", len(sites)):
            here = {name: (site, k) for name, site in sites[index].items() if (k := ranks[name]) is not None}
            if not (folder / block_file(index)).exists():
                input_of = {linear: group[0] for group in tower.inputs for linear in group}
                linears = dict.fromkeys(input_of[site.members[0]] for site, _ in here.values())
                inputs = gather(block, linears, partial(run, advance=False), device)
                factors = {}
                for name, (site, rank) in here.items():
                    weight = site_weight(block, site).to(device).double()
                    left, right, _ = load_spectrum(made, site, device).factors(weight, rank)
                    c = inputs[input_of[site.members[0]]].second_moment()
                    if not c.isfinite().all():
                        raise FloatingPointError(
                            f"{name}: its input is not finite once earlier blocks are compressed"
                        )
                    left = refit_left(weight, left, right, c)
                    check_finite(name, left, right)
                    factors[site.key] = left, right
                save_factors(folder, index, factors)
            # From the file also where it was just written, so that a run that was interrupted ends in the same
            # numbers as one that was not.
            for site, _ in here.values():
                factorize(block, site, *load_factors(folder, site))
            run()


def refit_left(weight: Tensor, left: Tensor, right: Tensor, second_moment: Tensor) -> Tensor:
    """The left' that minimises ‖(W − left' · right) C^½‖_F, and of all these the one nearest to ``left``.

    ``weight`` W (out, in), ``left`` (out, k), ``right`` (k, in), ``second_moment`` C (in, in), all float64; returns
    (out, k), float64. Where G = right C rightᵀ is regular this is W C rightᵀ G⁻¹, whatever ``left`` is. What C says
    nothing about (few tokens, dead channels) stays as ``left`` has it.
    """
    import torch

    from lowrank_lab.lowrank.solver import NOISE

    # Rounding in a sum of x xᵀ is relative to the two channels of each entry. So G is set up for inputs of unit
    # size, where it is the same everywhere, and in an orthonormal basis of what right passes on of them. In G as it
    # is, one channel a thousand times larger than the others, as language models have, would hide the rest.
    size = second_moment.diagonal().sqrt()
    unit = torch.where(size > 0, size, torch.ones_like(size))
    correlation = second_moment / unit / unit.unsqueeze(-1)
    q, triangle = torch.linalg.qr((right * size).T)
    u, sigma, vt = torch.linalg.svd(triangle)
    passed = sigma > NOISE * sigma[0]
    q, to_latent = q @ u[:, passed], vt[passed] / sigma[passed].unsqueeze(-1)  # right · size = vtᵀ σ (q u)ᵀ
    values, vectors = torch.linalg.eigh(q.T @ correlation @ q)
    kept = values > RESOLUTION * values[-1:]
    vectors = vectors[:, kept]
    residual = ((weight - left @ right) * unit) @ (correlation @ (q @ vectors))
    return left + (residual / values[kept]) @ (vectors.T @ to_latent)
