"""heat, cole_hopf, hopf_lax and viscous_hj against closed forms, quadrature, brute force and one another."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad

from lightning_entropy.pde import cole_hopf, gradient_hopf_lax, heat, hopf_lax, local_minima, viscous_hj

few = settings(max_examples=60, deadline=None, derandomize=True)
lines = arrays(np.float64, st.integers(2, 40), elements=st.floats(-50, 50, width=32))
planes = arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=st.floats(-50, 50, width=32))
functions = st.one_of(lines, planes)
times = st.floats(0.01, 100)
spacings = st.floats(0.1, 3)


def wavy(x):
    return x**2 + 1.5 * np.sin(2 * np.pi * x)


def cells(n, half_width):
    """Centres of n cells that fill [-half_width, half_width], and their width."""
    dx = 2 * half_width / n
    return dx * (np.arange(n) + 0.5) - half_width, dx


def brute_force(f, t, dx):
    points = np.indices(f.shape).reshape(f.ndim, -1) * dx
    cost = ((points[:, :, None] - points[:, None, :]) ** 2).sum(0) / (2 * t) + f.reshape(-1)
    return cost.min(axis=1).reshape(f.shape)


def order(errors):
    """Measured orders of convergence between grids that halve the spacing."""
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


# heat


@pytest.mark.parametrize("t", [1e-4, 0.02, 0.5, 30.0, 1e5])
def test_heat_damps_a_cosine_by_its_symbol(t):
    # cos(k pi (x - left) / width) is the eigenfunction that the mirrors allow
    x, dx = cells(256, 1.0)
    k = 3 * math.pi / 2
    wave = np.cos(k * (x + 1))
    tolerance = 1e-8 if t >= dx**2 else k**4 * dx**2 * t / 24 * 1.01
    np.testing.assert_allclose(heat(wave, t, dx), math.exp(-t * k**2 / 2) * wave, atol=tolerance)


def test_heat_below_one_cell_is_second_order():
    errors = []
    for n in (16, 32, 64):
        x, dx = cells(n, 1.0)
        wave = np.cos(math.pi * (x + 1))
        errors.append(np.abs(heat(wave, 1e-4, dx) - math.exp(-1e-4 * math.pi**2 / 2) * wave).max())
    assert order(errors) == pytest.approx([2, 2], abs=0.05)


@few
@given(functions, times, spacings)
@example(np.array([1.0, 2.0]), 1e12, 1.0)
@example(np.array([1.0, 2.0]), 1e-12, 1.0)
def test_heat_keeps_mean_and_bounds(f, t, dx):
    v = heat(f, t, dx)
    assert v.shape == f.shape
    assert v.mean() == pytest.approx(f.mean(), abs=1e-11)
    assert v.min() >= f.min() - 1e-11
    assert v.max() <= f.max() + 1e-11


@few
@given(functions, st.floats(2, 50), st.floats(2, 50))
def test_heat_is_a_semigroup(f, t, s):
    np.testing.assert_allclose(heat(heat(f, t, 1.0), s, 1.0), heat(f, t + s, 1.0), atol=1e-6)


@few
@given(functions, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_heat_is_a_semigroup_below_one_cell(f, t, s):
    np.testing.assert_allclose(heat(heat(f, t, 1.0), s, 1.0), heat(f, t + s, 1.0), atol=1e-11)


# cole_hopf


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("t", [0.1, 1.0])
def test_cole_hopf_of_a_quadratic(beta, t):
    x, dx = cells(800, 12.0)
    h = 1.7
    exact = h * x**2 / (2 * (1 + t * h)) + math.log(1 + t * h) / (2 * beta)
    inside = np.abs(x) < 4
    np.testing.assert_allclose(cole_hopf(h * x**2 / 2, t, dx, beta)[inside], exact[inside], atol=1e-9)


def test_cole_hopf_of_a_quadratic_in_the_plane():
    x, dx = cells(160, 10.0)
    a, b = np.meshgrid(x, x, indexing="ij")
    hessian = np.array([[2.0, 0.6], [0.6, 1.0]])
    points = np.stack([a, b], axis=-1)
    f = 0.5 * np.einsum("...i,ij,...j", points, hessian, points)
    smooth = hessian @ np.linalg.inv(np.eye(2) + 0.5 * hessian)
    exact = 0.5 * np.einsum("...i,ij,...j", points, smooth, points)
    exact += 0.5 * math.log(np.linalg.det(np.eye(2) + 0.5 * hessian))
    inside = (np.abs(a) < 3) & (np.abs(b) < 3)
    np.testing.assert_allclose(cole_hopf(f, 0.5, dx)[inside], exact[inside], atol=1e-9)


def test_cole_hopf_against_quadrature():
    x, dx = cells(600, 6.0)
    t, beta = 0.2, 1.5
    u = cole_hopf(wavy(x), t, dx, beta)
    for i in (200, 290, 317, 410):

        def integrand(y, at=x[i]):
            return math.exp(-beta * (wavy(y) + (at - y) ** 2 / (2 * t)))

        integral, _ = quad(integrand, -6, 6, points=[x[i], 0.0], limit=200, epsabs=1e-13)
        assert u[i] == pytest.approx(-math.log(integral / math.sqrt(2 * math.pi * t / beta)) / beta, abs=1e-8)


@few
@given(functions, times, spacings, st.floats(0.01, 1e4))
@example(np.array([0.0, 1000.0]), 1e-3, 1.0, 1.0)  # exponents far below the underflow of exp
@example(np.array([-1e6, 0.0, 1e6]), 10.0, 1.0, 1.0)
def test_cole_hopf_is_a_soft_minimum_of_hopf_lax(f, t, dx, beta):
    u = cole_hopf(f, t, dx, beta)
    assert np.isfinite(u).all()
    rounding = 1e-9 * (1 + 1 / beta + np.abs(f).max())
    assert (u >= f.min() - rounding).all()
    assert (u <= f.max() + rounding).all()
    deviation = math.sqrt(t / beta) / dx
    if deviation < min(f.shape) / 3:
        reach = np.arange(-400, 401)
        log_z = f.ndim * math.log(np.exp(-(reach**2) / (2 * deviation**2)).sum())
        gap = beta * (u - hopf_lax(f, t, dx)[0]) - log_z
        rounding *= 1 + beta
        assert (gap <= rounding).all()
        assert (gap >= -np.log(2.0 * np.array(f.shape)).sum() - rounding).all()


def test_cole_hopf_same_answer_by_the_product_and_by_logs(monkeypatch):
    x, dx = cells(300, 3.0)
    f = np.stack([40 * wavy(x), wavy(x)])
    by_product = cole_hopf(f, 0.3, dx)
    monkeypatch.setattr("lightning_entropy.pde.gaussian._SAFE_RANGE", 0.0)
    monkeypatch.setattr("lightning_entropy.pde.gaussian._BLOCK", 5000)
    np.testing.assert_allclose(cole_hopf(f, 0.3, dx), by_product, atol=1e-12, rtol=1e-13)


def test_cole_hopf_sees_a_valley_that_exp_cannot():
    # f = 0 in one cell, 5000 elsewhere; from distance d the path downhill costs d^2 / 2t
    f = np.full(101, 5000.0)
    f[0] = 0.0
    u = cole_hopf(f, 1.0, 1.0)
    d = np.arange(90)
    np.testing.assert_allclose(u[d], d**2 / 2 + math.log(2 * math.pi) / 2 - math.log(2) * (d < 0), atol=0.7)
    assert u[100] == pytest.approx(5000, abs=1.0)  # d^2 / 2 = 5000: both are as good


@few
@given(functions, st.floats(2, 40), st.floats(2, 40))
def test_cole_hopf_is_a_semigroup(f, t, s):
    f = f / 25
    np.testing.assert_allclose(cole_hopf(cole_hopf(f, t, 1.0), s, 1.0), cole_hopf(f, t + s, 1.0), atol=1e-6)


def test_cole_hopf_tends_to_heat_as_beta_vanishes():
    x, dx = cells(200, 3.0)
    variance = 0.3
    errors = [np.abs(cole_hopf(wavy(x), variance * b, dx, b) - heat(wavy(x), variance, dx)).max() for b in (4e-3, 2e-3)]
    assert errors[1] < 0.02
    assert order(errors) == pytest.approx([1], abs=0.05)


def test_cole_hopf_tends_to_hopf_lax_at_the_known_rate():
    # u = hopf_lax + log(1 + t f''(prox)) / (2 beta) + O(1/beta^2), away from the kinks
    x, dx = cells(1500, 3.0)
    t, k = 0.1, 2 * math.pi
    _, prox = hopf_lax(wavy(x), t, dx)
    smooth = np.abs(x) < 0.2
    x, y = x[smooth], x[prox][smooth]
    for _ in range(5):  # the minimiser between grid points, by Newton
        curvature = 2 - 1.5 * k**2 * np.sin(k * y) + 1 / t
        y = y - (2 * y + 1.5 * k * np.cos(k * y) + (y - x) / t) / curvature
    exact = wavy(y) + (x - y) ** 2 / (2 * t)
    rate = np.log(t * curvature) / 2
    assert rate.min() > 0.5

    gaps, residuals = [], []
    for beta in (100.0, 200.0, 400.0):
        gap = cole_hopf(wavy(cells(1500, 3.0)[0]), t, dx, beta)[smooth] - exact
        gaps.append(np.abs(gap).max())
        residuals.append(np.abs(gap - rate / beta).max())
    assert order(gaps) == pytest.approx([1, 1], abs=0.05)
    assert order(residuals) == pytest.approx([2, 2], abs=0.1)


# hopf_lax


@few
@given(functions, times, spacings)
@example(np.array([1.0, 1.0, 1.0]), 1.0, 1.0)  # ties
@example(np.array([0.0, 0.5, 2.0, 4.5, 8.0]), 1.0, 1.0)  # all parabolas cross at once
@example(np.array([0.0, -0.5, -2.0, -4.5, -8.0]), 1.0, 1.0)
def test_hopf_lax_is_the_minimum_over_all_pairs(f, t, dx):
    u, prox = hopf_lax(f, t, dx)
    np.testing.assert_allclose(u, brute_force(f, t, dx), atol=1e-12, rtol=1e-12)
    # and the prox is where it is attained
    here = np.indices(f.shape)
    distance2 = sum(((p - h) * dx) ** 2 for p, h in zip(prox, here, strict=True))
    np.testing.assert_allclose(f[prox] + distance2 / (2 * t), u, atol=1e-12, rtol=1e-12)


@few
@given(lines, times, spacings)
@example(np.array([0.5, 0.5, 0.0]), 0.01, 0.1)  # two parabolas touch, and one of them is rounded up
def test_hopf_lax_is_semiconcave_and_its_prox_increases(f, t, dx):
    u, (prox,) = hopf_lax(f, t, dx)
    assert (np.diff(u, 2) / dx**2 <= 1 / t + 1e-9 * (1 + np.abs(f).max()) / dx**2).all()
    assert (np.diff(prox) >= 0).all()
    assert (u <= f).all()
    assert u.min() == f.min()
    assert u.argmin() == f.argmin()


@few
@given(functions, times, times)
def test_hopf_lax_twice_is_never_below_once(f, t, s):
    # on a grid the path may only stop at its points: equality in the continuum, "not below" here
    twice = hopf_lax(hopf_lax(f, t, 1.0)[0], s, 1.0)[0]
    assert (twice >= hopf_lax(f, t + s, 1.0)[0] - 1e-9).all()


def test_hopf_lax_is_a_semigroup_to_second_order():
    errors = []
    for n in (200, 400, 800, 1600):
        x, dx = cells(n, 3.0)
        errors.append(
            np.abs(hopf_lax(hopf_lax(wavy(x), 0.07, dx)[0], 0.13, dx)[0] - hopf_lax(wavy(x), 0.2, dx)[0]).max()
        )
    assert errors[-1] < 1e-4
    assert order(errors).mean() > 1.7


@pytest.mark.parametrize("t", [0.05, 0.4, 2.0])
def test_hopf_lax_of_the_absolute_value_is_the_huber_function(t):
    x = np.linspace(-3, 3, 601)  # 0 is a grid point
    u, prox = hopf_lax(np.abs(x), t, 0.01)
    np.testing.assert_allclose(u, np.where(np.abs(x) <= t, x**2 / (2 * t), np.abs(x) - t / 2), atol=0.01**2 / (8 * t))
    soft = np.sign(x) * np.maximum(np.abs(x) - t, 0)
    inside = np.abs(x) < 3 - t
    np.testing.assert_allclose(x[prox][inside], soft[inside], atol=0.01)


def test_hopf_lax_of_a_quadratic_is_second_order():
    t, h = 0.5, 3.0
    errors = []
    for n in (100, 200, 400):
        x, dx = cells(n, 2.0)
        errors.append(np.abs(hopf_lax(h * x**2 / 2, t, dx)[0] - h * x**2 / (2 * (1 + t * h))).max())
        assert errors[-1] <= (h + 1 / t) * dx**2 / 8 * 1.0001
    assert order(errors) == pytest.approx([2, 2], abs=0.3)


# finite differences


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_viscous_hj_converges_to_cole_hopf_at_first_order(beta):
    errors = []
    for n in (100, 200, 400):
        x, dx = cells(n, 3.0)
        errors.append(np.abs(viscous_hj(wavy(x), 0.1, dx, beta) - cole_hopf(wavy(x), 0.1, dx, beta)).max())
    assert errors[-1] < 0.07
    assert (order(errors) > 0.75).all()
    assert (order(errors) < 1.3).all()


def test_inviscid_finite_differences_converge_to_hopf_lax():
    errors = []
    for n in (100, 200, 400, 800):
        x, dx = cells(n, 3.0)
        errors.append(np.abs(viscous_hj(wavy(x), 0.1, dx, math.inf) - hopf_lax(wavy(x), 0.1, dx)[0]).mean())
    assert errors[-1] < 0.015
    assert (order(errors) > 0.8).all()


@pytest.mark.parametrize("beta", [1.0, math.inf])
def test_finite_differences_agree_in_the_plane(beta):
    x, dx = cells(60, 2.0)
    a, b = np.meshgrid(x, x[:50], indexing="ij")
    f = wavy(a) + np.cos(3 * b) * a + b**2
    exact = hopf_lax(f, 0.2, dx)[0] if beta == math.inf else cole_hopf(f, 0.2, dx, beta)
    u = viscous_hj(f, 0.2, dx, beta)
    assert np.abs(f - exact).mean() > 0.5
    assert np.abs(u - exact).mean() < 0.15


@few
@given(functions, st.floats(0.01, 1), spacings, st.sampled_from([0.3, 1.0, math.inf]))
def test_finite_differences_are_monotone(f, t, dx, beta):
    u = viscous_hj(f, t, dx, beta)
    assert u.min() >= f.min() - 1e-9
    assert u.max() <= f.max() + 1e-9


# the two axes of a plane


@few
@given(planes, times, spacings)
def test_a_plane_does_not_prefer_an_axis(f, t, dx):
    for smooth in (heat, cole_hopf, lambda *a: hopf_lax(*a)[0]):
        np.testing.assert_allclose(smooth(f.T, t, dx), smooth(f, t, dx).T, atol=1e-9)
        line = np.broadcast_to(f[0], f.shape)  # constant along the first axis: each row is the 1-D answer
        np.testing.assert_allclose(smooth(line, t, dx), np.broadcast_to(smooth(f[0], t, dx), f.shape), atol=1e-9)


# the gradient


@pytest.mark.parametrize("method", ["prox", "fixed_point"])
def test_gradient_of_a_quadratic_in_the_plane(method):
    # grad u = (1 + tH)^{-1} H x
    x, dx = cells(80, 4.0)
    points = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1)
    hessian = np.array([[1.5, 0.4], [0.4, 0.8]])
    f = 0.5 * np.einsum("...i,ij,...j", points, hessian, points)
    t = 0.3
    slope = np.stack(gradient_hopf_lax(f, t, dx, method=method), axis=-1)
    exact = points @ (np.linalg.inv(np.eye(2) + t * hessian) @ hessian)
    inside = (np.abs(points) < 3).all(axis=-1)
    tolerance = {"prox": 0.5 * dx / t * 1.5, "fixed_point": 1e-10}[method]
    np.testing.assert_allclose(slope[inside], exact[inside], atol=tolerance)


def test_fixed_point_and_prox_and_difference_of_u_agree():
    x, dx = cells(2000, 3.0)
    f = np.sin(2 * x) + x**2 / 2
    t = 0.18  # Lip(grad f) = 5: t Lip = 0.9
    (by_iteration,) = gradient_hopf_lax(f, t, dx, method="fixed_point")
    (by_prox,) = gradient_hopf_lax(f, t, dx)
    inside = np.abs(x) < 2
    np.testing.assert_allclose(by_prox[inside], by_iteration[inside], atol=0.51 * dx / t)
    by_difference = np.gradient(hopf_lax(f, t, dx)[0], dx)
    assert np.abs(by_difference - by_iteration)[inside].mean() < 1e-3


@pytest.mark.parametrize("shape", [(401,), (41, 41)])
def test_fixed_point_contracts_up_to_the_boundary_and_is_refused_past_it(shape):
    # |x|^2 h / 2 has Lip(grad f) = h exactly, in one dimension and in two
    x = np.linspace(-2, 2, shape[0])
    f = sum(2.5 * a**2 / 2 for a in np.meshgrid(*[x] * len(shape), indexing="ij"))
    dx = x[1] - x[0]
    gradient_hopf_lax(f, 0.36, dx, method="fixed_point")
    with pytest.raises(ValueError, match=r"t \* Lip\(grad f\) must be < 1 .* got 1.03"):
        gradient_hopf_lax(f, 0.41, dx, method="fixed_point")


# what is refused


@pytest.mark.parametrize("smooth", [heat, cole_hopf, hopf_lax, viscous_hj, gradient_hopf_lax])
def test_bad_input_is_refused(smooth):
    f = [1.0, 2.0, 3.0]
    for t in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t must be finite and > 0, got"):
            smooth(f, t, 0.1)
    for dx in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="dx must be finite and > 0, got"):
            smooth(f, 1.0, dx)
    with pytest.raises(ValueError, match="f must be finite, got 1 values that are not"):
        smooth([1.0, math.nan, 2.0], 1.0, 0.1)
    for f in ([1.0], [], np.ones((1, 5)), np.ones((5, 1))):
        with pytest.raises(ValueError, match="f must have at least 2 points along every axis"):
            smooth(f, 1.0, 0.1)
    for f in (1.0, np.ones((3, 3, 3))):
        with pytest.raises(ValueError, match="f must have 1 or 2 axes"):
            smooth(f, 1.0, 0.1)


@pytest.mark.parametrize("smooth", [cole_hopf, viscous_hj])
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_bad_beta_is_refused(smooth, beta):
    with pytest.raises(ValueError, match="beta must be finite and > 0, got"):
        smooth([1.0, 2.0], 1.0, 0.1, beta)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be 'prox' or 'fixed_point', got 'newton'"):
        gradient_hopf_lax([1.0, 2.0], 1.0, 0.1, method="newton")


@pytest.mark.parametrize("smooth", [heat, cole_hopf, hopf_lax, viscous_hj, gradient_hopf_lax])
def test_the_argument_is_left_alone(smooth):
    f = np.linspace(0, 1, 7) ** 2
    before = f.copy()
    smooth(f, 0.1, 0.1)
    assert (f == before).all()


def test_local_minima_ignores_the_ends_and_flats():
    assert local_minima([0.0, 1.0, 1.0, 1.0, 0.0]).size == 0
    assert local_minima([1.0, 0.0, 1.0, 0.0]).tolist() == [1]
