import math

import numpy as np
import pytest
import torch

from lightning_entropy.diagnostics import flatness_profile, local_entropy
from lightning_entropy.diagnostics.estimate import mean_and_stderr, student
from lightning_entropy.diagnostics.gamma_ladder import climb
from lightning_entropy.diagnostics.gibbs import gibbs_samples
from tests.diagnostics import tiny

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


def batched(formula):
    def function(points):
        points = points.detach().requires_grad_()
        values = formula(points)
        return values.detach(), torch.autograd.grad(values.sum(), points)[0]

    return function


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


def test_chain_keeps_the_variance_at_any_step():
    """Metropolis removes the step's error: variance T / (h + gamma) even with one big leap."""
    found = gibbs_samples(
        batched(lambda y: 4.5 * y.square().sum(1)),
        torch.zeros(1, dtype=torch.float64),
        gamma=1.0,
        temperature=0.2,
        samples=400,
        warmup=50,
        leaps=1,
        start=torch.zeros(500, 1, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    # The virial of a quadratic is h <y^2>.
    assert found.virial.mean() == pytest.approx(9 * 0.2 / 10, rel=0.02)
    assert 0.6 < found.acceptance < 0.95


def test_public_function_agrees_with_the_closed_form():
    found = local_entropy(
        tiny.Point(0.5, 0.0),
        [torch.zeros(1)],
        loss=lambda m, b: (m.x.square() * m.x.new_tensor([3.0, 1.0])).sum() / 2,
        gamma=1.0,
        temperature=0.05,
        samples=40,
        chains=6,
        sigmas=[0.1, 0.2],
        draws=64,
    )
    rise = -0.5 * 9 * 0.25 / 4 + 0.025 * (math.log(4) + math.log(2))
    assert abs(found.rise - rise) < found.rise_error < 0.1
    assert np.abs(found.gradient - [0.375, 0.0]).max() < 4.03 * found.gradient_stderr.max()
    assert found.gradient_norm == pytest.approx(0.375, abs=0.05)
    volume = math.log(2 * math.pi * 0.05)
    assert found.local_entropy == pytest.approx(volume - (0.375 + found.rise) / 0.05)
    np.testing.assert_array_less(np.abs(found.profile.rises - np.array([0.1, 0.2]) ** 2 * 2), found.profile.errors)


def test_profile_keeps_its_error_bars():
    """E f(sigma xi) = sigma^2 tr(H) / 2 + 3/4 sigma^4 for f = x.Hx/2 + x_0^4 / 4."""
    curvature = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    hits = 0
    for seed in range(200):
        found = flatness_profile(
            tiny.Point(0.0, 0.0, 0.0),
            [torch.zeros(1)],
            [0.3, 0.6],
            loss=lambda m, b: (curvature * m.x.square()).sum() / 2 + m.x[0] ** 4 / 4,
            draws=40,
            seed=seed,
        )
        want = 5.5 / 2 * found.sigmas**2 + 0.75 * found.sigmas**4
        hits += (np.abs(found.rises - want) <= found.errors).mean()
    assert hits >= 190


def test_narrow_valley_rises_more():
    def rise(curvature):
        point, loss = tiny.Point(0.0), lambda m, b: curvature * m.x.square().sum()
        return local_entropy(point, [torch.zeros(1)], loss=loss, samples=20, warmup=10).rise

    assert rise(50.0) > rise(1.0) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "gamma must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"chains": 1}, "chains must be at least 2, got 1"),
        ({"sigmas": [0.0]}, "sigmas must be positive numbers"),
        ({"rungs": 3, "temperature": 1e-9}, "rungs must be enough"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        local_entropy(tiny.net(), tiny.data(), samples=2, warmup=1, **change)
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        flatness_profile(tiny.net(), tiny.data(), [0.1], draws=1)


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = local_entropy(tiny.net(), tiny.data(), samples=4, warmup=2, chains=2, leaps=1, sigmas=[0.01, 0.1])
    for result in (found, found.profile):
        figure, _ = result.plot()
        figure.canvas.draw()
    # At a maximum all rises are negative: nothing for logarithmic axes, and the picture says so.
    figure, axes = local_entropy(
        tiny.Point(0.0), [torch.zeros(1)], loss=lambda m, b: -m.x.square().sum() / 2, gamma=10.0, samples=20, warmup=5
    ).plot()
    assert "below f(x)" in axes.texts[-1].get_text()
    figure.canvas.draw()
    plt.close("all")
