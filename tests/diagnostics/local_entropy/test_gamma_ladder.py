import math

import numpy as np
import pytest
import torch

from lightning_entropy.diagnostics.estimate import mean_and_stderr, student
from lightning_entropy.diagnostics.local_entropy.gamma_ladder import climb
from tests.diagnostics.local_entropy.functions import batched

SEEDS, CHAINS = 200, 6


def runs(function, anchor, *, gamma, temperature, samples=150, leaps=3):
    """Two hundred independent estimates at once: each owns six of the chains."""
    ladder = climb(
        function,
        anchor,
        gamma=gamma,
        temperature=temperature,
        samples=samples,
        warmup=50,
        chains=SEEDS * CHAINS,
        leaps=leaps,
        rungs=40,
        draws=8,
        generator=torch.Generator().manual_seed(0),
    )
    values = [mean_and_stderr(part) for part in ladder.rises[:, 0].split(CHAINS)]
    gradients = [mean_and_stderr(part) for part in (-gamma * ladder.displacement).split(CHAINS)]
    return ladder, values, gradients


def covered(estimates, truth, slack=0.0):
    """Count the estimates whose 99 % error bar holds the truth (each component's, averaged)."""
    hits = [((m - truth).abs() <= student(dof) * s + slack).double().mean().item() for m, s, dof in estimates]
    return sum(hits)


def unbiased(estimates, truth, ladder):
    """No bias hides in the error bars: the 200 means together are as near as their own scatter says."""
    means = torch.stack([m for m, _, _ in estimates])
    assert abs(means.mean() - truth) <= 4 * means.std() / math.sqrt(SEEDS) + 2 * ladder.quadrature_errors[0]


def by_quadrature(formula, anchor, gamma, temperature):
    """u - f(x) and gamma (x - <y>) on a fine grid in one or two dimensions."""
    width = 8 * math.sqrt(temperature / gamma)
    axes = [torch.linspace(x - width, x + width, 801, dtype=torch.float64) for x in anchor.tolist()]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(anchor))
    base = formula(anchor[None])[0]
    log_prior = -gamma * (grid - anchor).square().sum(1) / (2 * temperature)
    log_weight = log_prior - (formula(grid) - base) / temperature
    rise = -temperature * (torch.logsumexp(log_weight, 0) - torch.logsumexp(log_prior, 0))
    mean = torch.softmax(log_weight, 0) @ grid
    return rise.item(), gamma * (anchor - mean)


@pytest.mark.parametrize(("gamma", "temperature"), [(0.5, 0.1), (20.0, 1.0)])
def test_quadratic_closed_form(gamma, temperature):
    """f = x.Hx/2: grad u = gamma (H + gamma)^-1 H x; u = x.grad u/2 + T/2 log det(1 + H / gamma)."""
    curvature = torch.tensor([0.1, 1.0, 4.0, 30.0], dtype=torch.float64)
    anchor = torch.tensor([1.0, -0.5, 0.3, 0.1], dtype=torch.float64)
    ladder, values, gradients = runs(
        batched(lambda y: (curvature * y.square()).sum(1) / 2), anchor, gamma=gamma, temperature=temperature
    )
    gradient = gamma * curvature * anchor / (curvature + gamma)
    rise = (anchor @ gradient - anchor @ (curvature * anchor)) / 2
    rise = rise + temperature / 2 * torch.log1p(curvature / gamma).sum()
    assert covered(values, rise, ladder.quadrature_errors[0]) >= 0.95 * SEEDS
    assert covered(gradients, gradient) >= 0.95 * SEEDS
    unbiased(values, rise.item(), ladder)


@pytest.mark.parametrize(
    ("formula", "anchor", "samples"),
    [
        (lambda y: (y[:, 0] ** 2 - 1) ** 2 + 0.3 * torch.sin(5 * y[:, 0]), [0.6], 500),
        (
            lambda y: (y[:, 0] ** 2 - 1) ** 2 / 4 + y[:, 1] ** 2 / 2 + 0.5 * torch.cos(3 * y[:, 0] * y[:, 1]),
            [0.4, -0.3],
            200,
        ),
    ],
)
def test_non_convex_against_quadrature(formula, anchor, samples):
    anchor = torch.tensor(anchor, dtype=torch.float64)
    # Two wells: chains must cross.
    ladder, values, gradients = runs(batched(formula), anchor, gamma=1.0, temperature=0.3, samples=samples)
    rise, gradient = by_quadrature(formula, anchor, 1.0, 0.3)
    assert covered(values, rise, ladder.quadrature_errors[0]) >= 0.95 * SEEDS
    assert covered(gradients, gradient) >= 0.95 * SEEDS
    unbiased(values, rise, ladder)


def test_whole_ladder_follows_the_curve():
    ladder, _, _ = runs(
        batched(lambda y: 5 * y.square().sum(1)), torch.zeros(3, dtype=torch.float64), gamma=1.0, temperature=1.0
    )
    want = 3 / 2 * np.log1p(10 / ladder.gammas)
    np.testing.assert_allclose(ladder.rises.mean(0), want, rtol=0.02)
