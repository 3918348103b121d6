"""fokker_planck against Gibbs, Ornstein-Uhlenbeck, the exponential of its generator, and particles."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import expm
from scipy.stats import kstest

from lightning_entropy.pde import fokker_planck, gibbs
from lightning_entropy.pde.density import _implicit_step
from tests.pde.grids import cells, few, wavy


def moments(rho, x, dx):
    mean = (rho @ x) * dx
    return mean, (rho @ (x - mean) ** 2) * dx


def bump(x, dx, centre, deviation):
    rho = np.exp(-((x - centre) ** 2) / (2 * deviation**2))
    return rho / (rho.sum() * dx)


@few
@given(st.data(), st.integers(2, 60), st.floats(1e-3, 10), st.floats(1e-2, 1), st.floats(1e-4, 1e3), st.booleans())
def test_mass_is_kept_and_nothing_is_negative(data, n, diffusion, dx, T, by_drift):
    rho0 = data.draw(arrays(np.float64, n, elements=st.floats(0, 5)))
    rho0[data.draw(st.integers(0, n - 1))] += 1
    field = data.draw(arrays(np.float64, n - by_drift, elements=st.floats(-200, 200)))
    kind = {"drift": field} if by_drift else {"potential": lambda s: field * math.cos(s)}
    rho = fokker_planck(rho0, T, dx, diffusion=diffusion, dt=T / 20, **kind)
    assert rho.min() >= 0
    assert rho.sum() == pytest.approx(rho0.sum(), rel=1e-12)


def test_the_scheme_itself_keeps_mass():
    # one step of the bare solver, before rounding is swept up
    x, dx = cells(500, 3.0)
    rho = _implicit_step(bump(x, dx, 2.5, 0.1), np.diff(wavy(x)) / 0.1, 10.0)
    assert abs(rho.sum() * dx - 1) < 1e-13


def test_mass_is_kept_over_a_thousand_steps_of_a_rough_landscape():
    x, dx = cells(500, 3.0)
    f = wavy(x) + np.random.default_rng(0).normal(size=500)
    rho = fokker_planck(bump(x, dx, 2.5, 0.1), 10.0, dx, diffusion=0.1, potential=f)
    assert abs(rho.sum() * dx - 1) < 1e-12
    assert rho.min() >= 0


@pytest.mark.parametrize("diffusion", [0.1, 1.0])
def test_gibbs_density_is_kept_and_reached(diffusion):
    x, dx = cells(300, 3.0)
    f = wavy(x) if diffusion == 1.0 else x**2 + 0.2 * np.sin(2 * np.pi * x)
    target = np.exp(-f / diffusion)
    target /= target.sum() * dx
    np.testing.assert_allclose(gibbs(f, dx, diffusion=diffusion), target, rtol=1e-12)
    kept = fokker_planck(target, 5.0, dx, diffusion=diffusion, potential=f, dt=0.1)
    np.testing.assert_allclose(kept, target, rtol=1e-10)
    reached = fokker_planck(bump(x, dx, 2.5, 0.1), 200.0, dx, diffusion=diffusion, potential=f)
    np.testing.assert_allclose(reached, target, atol=1e-9 * target.max())


def test_ornstein_uhlenbeck_mean_and_variance_over_time():
    # dx = -k x dt + sqrt(2 D) dW: mean m e^{-kt}, variance D/k + (v - D/k) e^{-2kt}
    k, diffusion = 1.3, 0.4
    x, dx = cells(400, 5.0)
    rho0 = bump(x, dx, 2.0, 0.3)
    mean0, variance0 = moments(rho0, x, dx)
    times = np.array([0.1, 0.5, 1.0, 3.0])
    rho = fokker_planck(rho0, times, dx, diffusion=diffusion, potential=k * x**2 / 2, dt=1e-3)
    assert rho.shape == (4, 400)
    for row, t in zip(rho, times, strict=True):
        mean, variance = moments(row, x, dx)
        assert mean == pytest.approx(mean0 * math.exp(-k * t), abs=3e-3)
        exact = diffusion / k + (variance0 - diffusion / k) * math.exp(-2 * k * t)
        assert variance == pytest.approx(exact, abs=3e-3)


def test_a_drift_at_the_faces_is_minus_the_slope_of_the_potential():
    x, dx = cells(60, 2.0)
    rho0 = bump(x, dx, 1.0, 0.3)
    by_potential = fokker_planck(rho0, 0.5, dx, diffusion=0.3, potential=wavy(x))
    by_drift = fokker_planck(rho0, 0.5, dx, diffusion=0.3, drift=-np.diff(wavy(x)) / dx)
    np.testing.assert_allclose(by_drift, by_potential, atol=1e-13)
    to_the_right = fokker_planck(rho0, 0.1, dx, diffusion=0.3, drift=np.full(59, 2.0))
    assert moments(to_the_right, x, dx)[0] == pytest.approx(moments(rho0, x, dx)[0] + 0.2, abs=0.01)


def test_implicit_euler_is_first_order_in_dt():
    # against the exponential of the same generator, built column by column from one tiny step
    x, dx = cells(30, 2.0)
    V, diffusion, T = wavy(x), 0.5, 0.3
    inverse = np.stack(
        [fokker_planck(e, 1e-3, dx, diffusion=diffusion, potential=V, dt=1e-3) for e in np.eye(30)], axis=1
    )
    generator = (np.eye(30) - np.linalg.inv(inverse)) / 1e-3
    rho0 = bump(x, dx, 1.0, 0.3)
    exact = expm(T * generator) @ rho0
    steps = (0.005, 0.0025, 0.00125)
    errors = [np.abs(fokker_planck(rho0, T, dx, diffusion=diffusion, potential=V, dt=dt) - exact).max() for dt in steps]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.25)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)


def test_scharfetter_gummel_is_second_order_in_dx():
    errors = []
    for n in (50, 100, 200):
        means = []
        for refined in (n, 1600):
            y, dy = cells(refined, 3.0)
            rho = fokker_planck(np.exp(-((y - 1) ** 2) / 0.5), 0.4, dy, diffusion=0.5, potential=wavy(y), dt=0.01)
            means.append(moments(rho / (rho.sum() * dy), y, dy)[0])
        errors.append(abs(means[0] - means[1]))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.25)


def test_density_agrees_with_particles_in_a_potential_that_moves():
    # V = (x - sin 3s)^2 + x^4/4, 1e5 particles: the distribution functions differ by less than 3 / sqrt(n) + dt effects
    x, dx = cells(400, 4.0)
    rho0 = bump(x, dx, 1.5, 0.2)
    diffusion, T, steps, n = 0.3, 1.0, 400, 100_000
    rho = fokker_planck(
        rho0, T, dx, diffusion=diffusion, potential=lambda s: (x - math.sin(3 * s)) ** 2 + x**4 / 4, dt=T / 1000
    )
    generator = np.random.default_rng(3)
    particles = 1.5 + 0.2 * generator.standard_normal(n)
    for s in np.arange(steps) * (T / steps):
        force = -2 * (particles - math.sin(3 * s)) - particles**3
        particles += T / steps * force + math.sqrt(2 * diffusion * T / steps) * generator.standard_normal(n)
    faces = np.append(x - dx / 2, 4.0)
    distribution = np.concatenate([[0.0], np.cumsum(rho) * dx])
    assert kstest(particles, lambda at: np.interp(at, faces, distribution)).statistic < 0.009
    # and the test tells: a potential that stands still is far off
    still = fokker_planck(rho0, T, dx, diffusion=diffusion, potential=x**2 + x**4 / 4)
    wrong = np.concatenate([[0.0], np.cumsum(still) * dx])
    assert kstest(particles, lambda at: np.interp(at, faces, wrong)).statistic > 0.1


def test_times_in_a_row_are_the_runs_one_after_another():
    x, dx = cells(40, 2.0)
    rho0 = bump(x, dx, 1.0, 0.3)
    a, b = fokker_planck(rho0, [0.2, 0.5], dx, diffusion=0.3, potential=x**2, dt=0.01)
    np.testing.assert_allclose(a, fokker_planck(rho0, 0.2, dx, diffusion=0.3, potential=x**2, dt=0.01), rtol=1e-12)
    np.testing.assert_allclose(b, fokker_planck(a, 0.3, dx, diffusion=0.3, potential=x**2, dt=0.01), rtol=1e-12)


def test_fokker_planck_refuses_bad_input():
    rho, V = np.ones(5), np.zeros(5)

    def call(rho0=rho, T=1.0, dx=0.1, diffusion=1.0, **kind):
        return fokker_planck(rho0, T, dx, diffusion=diffusion, **(kind or {"potential": V}))

    for T in (0.0, -1.0, math.nan, [], [1.0, 0.5], [0.0, 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="T must be"):
            call(T=T)
    for bad in (np.zeros(5), np.array([1.0, -0.1, 1, 1, 1])):
        with pytest.raises(ValueError, match="rho0 must be >= 0 and not all zero"):
            call(bad)
    with pytest.raises(ValueError, match="rho0 must have at least 2 points"):
        call([1.0])
    with pytest.raises(ValueError, match="rho0 must have 1 axes"):
        call(np.ones((3, 3)))
    with pytest.raises(ValueError, match="diffusion must be finite and > 0"):
        call(diffusion=0.0)
    with pytest.raises(ValueError, match="dx must be finite and > 0"):
        call(dx=-1.0)
    with pytest.raises(ValueError, match="dt must be finite and > 0"):
        call(potential=V, dt=0.0)
    with pytest.raises(ValueError, match="exactly one of potential and drift"):
        call(potential=V, drift=V[1:])
    with pytest.raises(ValueError, match="exactly one of potential and drift"):
        call(potential=None)
    with pytest.raises(ValueError, match=r"drift must have shape \(4,\) .* got \(5,\)"):
        call(drift=V)
    with pytest.raises(ValueError, match="potential must be finite, got 5"):
        call(potential=lambda s: V * (math.nan if s > 0.5 else 1.0))
