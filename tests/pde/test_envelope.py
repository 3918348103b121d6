"""hopf_lax against brute force and closed forms, and its gradient by two ways that share nothing."""

import numpy as np
import pytest
from hypothesis import example, given

from lightning_entropy.pde import gradient_hopf_lax, hopf_lax
from tests.pde.grids import cells, few, functions, lines, order, spacings, times, wavy


def brute_force(f, t, dx):
    points = np.indices(f.shape).reshape(f.ndim, -1) * dx
    cost = ((points[:, :, None] - points[:, None, :]) ** 2).sum(0) / (2 * t) + f.reshape(-1)
    return cost.min(axis=1).reshape(f.shape)


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


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be 'prox' or 'fixed_point', got 'newton'"):
        gradient_hopf_lax([1.0, 2.0], 1.0, 0.1, method="newton")
