"""viscous_hj against the closed forms it is there to check."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_entropy.pde import cole_hopf, hopf_lax, viscous_hj
from tests.pde.grids import cells, few, functions, order, spacings, wavy


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
