"""controlled_sde against Bellman: the least cost is cole_hopf, path by path."""

import math

import numpy as np
import pytest

from lightning_entropy.pde import cole_hopf, controlled_sde
from lightning_entropy.pde.control import _reflect
from tests.pde.grids import cells, wavy


def talk():
    x, dx = cells(300, 3.0)
    rough = np.random.default_rng(1).normal(size=300)
    window = np.exp(-(x**2) / (2 * 0.05**2))
    return x, dx, wavy(x) + np.convolve(rough, window / window.sum(), "same")


@pytest.mark.parametrize("x0", [-2.0, -1.0, 0.3, 1.2, 2.5])
def test_the_optimal_cost_is_u(x0):
    x, dx, f = talk()
    T, beta = 0.2, 1.0
    u = np.interp(x0, x, cole_hopf(f, T, dx, beta))
    options = {"left": x[0], "particles": 5000, "steps": 300}
    steered = controlled_sde(f, T, beta, x0, dx, **options)
    free = controlled_sde(f, T, beta, x0, dx, controlled=False, **options)
    assert abs(steered.value - u) < 3 * steered.standard_error
    assert steered.standard_error < 0.03
    # on every path, not only in the mean
    pathwise = steered.terminal + steered.effort + steered.martingale
    assert pathwise.mean() == pytest.approx(u, abs=0.02)
    assert pathwise.std() < 0.25 * (steered.terminal + steered.effort).std()
    # zero control is allowed, and dearer
    assert steered.terminal.mean() < u < free.terminal.mean()
    assert (free.effort == 0).all()
    # the end points have the density of the local Gibbs measure, exp(-f(y) - |x0 - y|^2 / 2T)
    measure = np.exp(-beta * (f + (x - x0) ** 2 / (2 * T)))
    measure /= measure.sum()
    assert steered.terminal.mean() == pytest.approx(
        measure @ f, abs=4 * steered.terminal.std() / math.sqrt(5000) + 0.01
    )
    assert steered.final.mean() == pytest.approx(measure @ x, abs=4 * steered.final.std() / math.sqrt(5000) + 0.005)


def test_the_bias_of_the_value_is_first_order_in_the_steps():
    x, dx, f = talk()
    u = np.interp(0.3, x, cole_hopf(f, 0.2, dx, 1.0))
    bias = []
    for steps in (25, 50, 100):
        run = controlled_sde(f, 0.2, 1.0, 0.3, dx, left=x[0], particles=20_000, steps=steps)
        bias.append((run.terminal + run.effort + run.martingale).mean() - u)
    assert bias[2] > 0
    assert np.log2(bias[0] / bias[2]) == pytest.approx(2, abs=0.5)


def test_another_control_costs_more():
    # f = h x^2 / 2: u in closed form, and a control of half the strength is dearer
    x, dx = cells(240, 6.0)
    T, beta, x0 = 1.0, 2.0, 1.5
    u = x0**2 / (2 * (1 + T)) + math.log(1 + T) / (2 * beta)
    run = controlled_sde(x**2 / 2, T, beta, x0, dx, left=x[0], particles=10_000, steps=200)
    assert run.value == pytest.approx(u, abs=3 * run.standard_error + 0.005)
    weaker = controlled_sde(x**2 / 4, T, beta, x0, dx, left=x[0], particles=10_000, steps=200)  # optimal for half of f
    assert (2 * weaker.terminal + weaker.effort).mean() > u + 0.02


def test_runs_are_reproducible_and_share_their_noise():
    x, dx, f = talk()
    a = controlled_sde(f, 0.1, 1.0, 0.0, dx, left=x[0], particles=10, steps=5, kept=3, seed=7)
    b = controlled_sde(f, 0.1, 1.0, 0.0, dx, left=x[0], particles=10, steps=5, kept=3, seed=7)
    free = controlled_sde(f * 0, 0.1, 1.0, 0.0, dx, left=x[0], particles=10, steps=5, kept=3, seed=7)
    none = controlled_sde(f, 0.1, 1.0, 0.0, dx, left=x[0], particles=10, steps=5, kept=3, seed=7, controlled=False)
    assert (a.final == b.final).all()
    assert a.paths.shape == (6, 3)
    assert a.times[0] == 0
    assert a.times[-1] == 0.1
    assert (a.paths[-1] == a.final[:3]).all()
    np.testing.assert_allclose(free.final, none.final, atol=1e-12)


def test_two_mirrors():
    np.testing.assert_allclose(_reflect(np.array([0.2, -0.3, 1.4, 2.5, -3.2]), 0.0, 1.0), [0.2, 0.3, 0.6, 0.5, 0.8])


def test_controlled_sde_refuses_bad_input():
    f = np.zeros(5)
    for T in (0.0, math.nan):
        with pytest.raises(ValueError, match="T must be finite and > 0"):
            controlled_sde(f, T, 1.0, 0.2, 0.1)
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        controlled_sde(f, 1.0, 0.0, 0.2, 0.1)
    for x0 in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="x0 must be on the grid"):
            controlled_sde(f, 1.0, 1.0, x0, 0.1)
    with pytest.raises(ValueError, match="particles must be >= 2 and steps >= 1, got 1 and 5"):
        controlled_sde(f, 1.0, 1.0, 0.2, 0.1, particles=1, steps=5)
    with pytest.raises(ValueError, match="f must have 1 axes"):
        controlled_sde(np.zeros((3, 3)), 1.0, 1.0, 0.2, 0.1)
