"""The spectra of products of two linears within a head (COMCAT), from the solver of single linears.

With x̃ = [x, 1] a head's product is P Q (modules/heads.py). At rank k it becomes P X Q with X (size, size) of that
rank, and its error ‖R^½ P (I − X) Q C^½‖ is that of the identity under the metrics Q C Qᵀ and Pᵀ R P. So it is
solved exactly, with biases, by decompositions as small as a head.

C is the metric of x̃. On the side of queries R is that too, since queries are made of the same inputs: with C the
second moment, the error is the mean square by which the scores of two independent tokens change. On the side of
outputs R is the metric's own. There, what an output is made of are not values of single tokens but means of them,
weighted by the attention: where C is a matrix, Q C Qᵀ is the metric of these, which are the inputs of the output
linear, and the error is that of the head's output itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank_lab.calibration.summaries import InputStatistics, OutputStatistics
from lowrank_lab.lowrank.metric.base import Metric
from lowrank_lab.lowrank.solver import Spectrum, decompose
from lowrank_lab.modules.heads import product_of
from lowrank_lab.modules.site import HeadSite


def spectrum_of_head(
    block: nn.Module,
    site: HeadSite,
    metric: Metric,
    inputs: InputStatistics | None,
    mean: Tensor | None,
    attended: InputStatistics | None,
    outputs: OutputStatistics | None,
    device: torch.device,
) -> Spectrum:
    """The spectrum of the identity between the factors of a product, float64.

    ``inputs`` and ``mean`` (width,) are of the attention's input, ``attended`` and ``outputs`` of its output
    linear; None where the metric does not need them.
    """
    p, q = (factor.to(device) for factor in product_of(block, site))
    c, r = metric(None if inputs is None else with_one(inputs, mean), outputs)
    samples = inputs.tokens if inputs is not None and c is not None and c.ndim == 2 else None
    eye = torch.eye(site.inp, dtype=torch.float64, device=device)
    if site.product == "qk":
        return decompose(eye, _between(q, c), _between(p.T, c), samples)
    if attended is not None and c is not None and c.ndim == 2:
        c_between, _ = metric(of_head(attended, site), outputs)
        return decompose(eye, c_between, _between(p.T, r), samples)
    return decompose(eye, _between(q, c), _between(p.T, r), samples)


def of_head(attended: InputStatistics, site: HeadSite) -> InputStatistics:
    """The statistics of the values of one head among those of all."""
    own = slice(site.head * site.inp, (site.head + 1) * site.inp)
    return InputStatistics(
        attended.tokens, attended.second_moment[own, own], attended.abs_mean[own], attended.abs_max[own]
    )


def with_one(inputs: InputStatistics, mean: Tensor | None) -> InputStatistics:
    """The statistics of [x, 1] from those of x and its ``mean``."""
    assert mean is not None
    one = mean.new_ones(1)
    column = torch.cat([mean, one])
    moment = torch.cat([torch.cat([inputs.second_moment, mean[None]]), column[:, None]], 1)
    return replace(
        inputs,
        second_moment=moment,
        abs_mean=torch.cat([inputs.abs_mean, one]),
        abs_max=torch.cat([inputs.abs_max, one]),
    )


def _between(factor: Tensor, metric: Tensor | None) -> Tensor:
    """factor · metric · factorᵀ, symmetric to the last digit; None is the identity."""
    weighted = factor if metric is None else factor * metric if metric.ndim == 1 else factor @ metric
    product = weighted @ factor.T
    return (product + product.T) / 2
