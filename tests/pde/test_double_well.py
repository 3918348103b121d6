"""The double well: what its current leaves alone, where it turns the equilibria, and where the paper errs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.stats import kstest

from lightning_entropy.pde import DoubleWell
from tests.pde.grids import few

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
