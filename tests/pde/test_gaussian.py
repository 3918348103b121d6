"""heat and cole_hopf against closed forms, quadrature and hopf_lax."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.integrate import quad

from lightning_entropy.pde import cole_hopf, heat, hopf_lax
from tests.pde.grids import cells, few, functions, order, spacings, times, wavy


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
