"""Densities, steered particles and the double well against Gibbs, Ornstein-Uhlenbeck, Bellman and one another."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.linalg import expm
from scipy.stats import kstest

from lightning_entropy.pde import DoubleWell, cole_hopf, controlled_sde, fokker_planck, gibbs
from lightning_entropy.pde.control import _reflect
from lightning_entropy.pde.density import _implicit_step

few = settings(max_examples=60, deadline=None, derandomize=True)


def cells(n, half_width):
    dx = 2 * half_width / n
    return dx * (np.arange(n) + 0.5) - half_width, dx


def moments(rho, x, dx):
    mean = (rho @ x) * dx
    return mean, (rho @ (x - mean) ** 2) * dx


def bump(x, dx, centre, deviation):
    rho = np.exp(-((x - centre) ** 2) / (2 * deviation**2))
    return rho / (rho.sum() * dx)


def wavy(x):
    return x**2 + 1.5 * np.sin(2 * np.pi * x)


# fokker_planck


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


# controlled_sde


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


# the double well

STRENGTHS = [0.0, 0.5, 1.5]


def derivative(field, x, axis, h=1e-5):
    step = h * np.eye(2)[axis]
    return (field(x + step) - field(x - step)) / (2 * h)


def divergence(field, x):
    return derivative(lambda p: field(p)[..., 0], x, 0) + derivative(lambda p: field(p)[..., 1], x, 1)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_density_is_stationary_for_every_strength(strength):
    # Fokker-Planck: div(force rho - grad rho) = 0, by differences at random points
    well = DoubleWell(strength)
    x = np.random.default_rng(0).normal(size=(200, 2))

    def flux(p):
        gradient = np.stack([derivative(well.density, p, 0), derivative(well.density, p, 1)], axis=-1)
        return well.force(p) * well.density(p)[..., None] - gradient

    assert np.abs(divergence(flux, x)).max() < 1e-5


def test_what_holds_of_the_current_and_what_does_not():
    well = DoubleWell(0.5)
    x = np.random.default_rng(0).normal(size=(200, 2))
    assert np.abs(divergence(well.probability_current, x)).max() < 1e-8
    np.testing.assert_allclose(
        well.current(x) * np.exp(-well.potential(x))[:, None], well.probability_current(x), atol=1e-14
    )
    # Assumption 4, div j = 0, fails: it is lambda e^{Phi - |x|^4 / 4} x1 x2 (2 - x1^2)
    x1, x2 = x.T
    exact = 0.5 * np.exp(well.potential(x) - (x**2).sum(1) ** 2 / 4) * x1 * x2 * (2 - x1**2)
    np.testing.assert_allclose(divergence(well.current, x), exact, atol=1e-8)
    assert np.abs(exact).max() > 0.1


def test_density_has_mass_one():
    well = DoubleWell(1.0)
    mass, _ = quad(lambda a: well.density([a, 0.0]) * math.sqrt(2 * math.pi), -6, 6)  # the second axis is a Gaussian
    assert mass == pytest.approx(1, abs=1e-9)


def test_equilibria_move_off_the_minima_and_vanish():
    assert DoubleWell(0.0).equilibria() == pytest.approx(np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert DoubleWell(0.5).equilibria() == pytest.approx(np.array([[0.902, 0.389], [-0.902, -0.389]]), abs=5e-4)
    assert DoubleWell(-0.5).equilibria() == pytest.approx(np.array([[0.902, -0.389], [-0.902, 0.389]]), abs=5e-4)
    for strength in (0.7, 0.77):
        rest = DoubleWell(strength).equilibria()
        assert np.abs(DoubleWell(strength).force(rest)).max() < 1e-9
        assert len(rest) == 2
    for strength in (0.78, 0.8, 1.0, 1.5, 3.0, -2.0):
        assert len(DoubleWell(strength).equilibria()) == 0


def test_the_origin_turns_from_saddle_to_centre_at_exp_minus_a_quarter():
    for strength, is_saddle in ((0.77, True), (0.78, False)):
        force = DoubleWell(strength).force
        jacobian = np.stack([derivative(force, np.zeros(2), axis) for axis in (0, 1)], axis=1)
        assert np.trace(jacobian) == pytest.approx(0, abs=1e-8)
        assert (np.linalg.det(jacobian) < 0) == is_saddle


def test_there_is_no_limit_cycle_at_the_papers_strength():
    starts = np.random.default_rng(0).normal(size=(5, 2))
    path = DoubleWell(1.5).trajectory(starts, 400.0, dt=0.1)
    radius = np.sqrt((path**2).sum(-1).max(-1))
    early, late = radius[960:1001].max(), radius[-41:].max()  # over one turn, as the orbits are ellipses
    assert late < 0.2
    # algebraic, radius ~ t^{-1/2}: a quarter of the time has twice the radius
    assert early / late == pytest.approx(2, abs=0.15)


def test_the_current_goes_round_in_circles():
    path = DoubleWell(1.0).trajectory([[0.6, 0.8], [0.3, 0.0]], 20.0, follow="current")
    np.testing.assert_allclose(np.linalg.norm(path, axis=-1), np.broadcast_to([1.0, 0.3], path.shape[:2]), atol=1e-6)
    angle = np.unwrap(np.arctan2(path[:, 1, 1], path[:, 1, 0]))
    assert angle[-1] > 2 * math.pi


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_particles_forget_the_strength_in_their_density(strength):
    x = DoubleWell(strength).particles(np.zeros((20_000, 2)), 6.0, dt=0.02, seed=1)
    line = np.linspace(-4, 4, 801)
    marginal = np.exp(-((line**2 - 1) ** 2) / 4)
    distribution = np.cumsum(marginal) / marginal.sum()
    assert kstest(x[:, 0], lambda at: np.interp(at, line, distribution)).statistic < 0.015
    assert kstest(x[:, 1], "norm").statistic < 0.015
    # moments tell a wrong temperature; dt = 0.02 adds 1 % at rest and 4 % in the current
    assert (x[:, 0] ** 2).mean() == pytest.approx((line**2 * marginal).sum() / marginal.sum(), abs=0.06)
    assert x[:, 1].var() == pytest.approx(1, abs=0.06)


def test_particles_go_round_only_with_a_current():
    # E[x1 dx2 - x2 dx1] / dt = lambda E[e^Phi |x|^2 e^{-|x|^4/4}], the circulation the density hides
    for strength in (0.0, 1.0):
        well = DoubleWell(strength)
        x = well.particles(np.zeros((20_000, 2)), 3.0, dt=0.02)
        force = well.force(x)
        gradient = DoubleWell(0.0).force(x)
        turning = (x[:, 0] * (force - gradient)[:, 1] - x[:, 1] * (force - gradient)[:, 0]).mean()
        # the integral of |x|^2 exp(-|x|^4 / 4) over the plane is 2 pi; 1/Z = density(0) e^{Phi(0)} = density(0) e^{1/4}
        exact = strength * 2 * math.pi * float(well.density([0.0, 0.0])) * math.exp(0.25)
        assert turning == pytest.approx(exact, abs=0.02)


def test_double_well_refuses_bad_input():
    with pytest.raises(ValueError, match="strength must be finite, got nan"):
        DoubleWell(math.nan)
    well = DoubleWell(0.5)
    with pytest.raises(ValueError, match=r"points must be finite, of shape \(..., 2\)"):
        well.force([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="points must be finite"):
        well.force([math.nan, 0.0])
    with pytest.raises(ValueError, match="T must be finite and > 0"):
        well.particles([[0.0, 0.0]], 0.0)
    with pytest.raises(ValueError, match="dt must be finite and > 0"):
        well.trajectory([0.0, 0.0], 1.0, dt=0.0)
    with pytest.raises(ValueError, match="follow must be 'force' or 'current', got 'wind'"):
        well.trajectory([0.0, 0.0], 1.0, follow="wind")


@few
@given(st.floats(-2, 2), arrays(np.float64, (3, 2), elements=st.floats(-100, 100)))
def test_the_double_well_is_symmetric_and_never_overflows(strength, x):
    well = DoubleWell(strength)
    force = well.force(x)
    assert np.isfinite(force).all()
    np.testing.assert_allclose(well.force(-x), -force)
    mirror = np.array([1.0, -1.0])
    np.testing.assert_allclose(DoubleWell(-strength).force(x * mirror), force * mirror)
