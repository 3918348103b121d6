"""What every function on a grid has in common: the input it refuses and leaves alone, and no preferred axis."""

import math

import numpy as np
import pytest
from hypothesis import given

from lightning_entropy.pde import cole_hopf, gradient_hopf_lax, heat, hopf_lax, local_minima, viscous_hj
from tests.pde.grids import few, planes, spacings, times


@few
@given(planes, times, spacings)
def test_a_plane_does_not_prefer_an_axis(f, t, dx):
    for smooth in (heat, cole_hopf, lambda *a: hopf_lax(*a)[0]):
        np.testing.assert_allclose(smooth(f.T, t, dx), smooth(f, t, dx).T, atol=1e-9)
        line = np.broadcast_to(f[0], f.shape)  # constant along the first axis: each row is the 1-D answer
        np.testing.assert_allclose(smooth(line, t, dx), np.broadcast_to(smooth(f[0], t, dx), f.shape), atol=1e-9)


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


@pytest.mark.parametrize("smooth", [heat, cole_hopf, hopf_lax, viscous_hj, gradient_hopf_lax])
def test_the_argument_is_left_alone(smooth):
    f = np.linspace(0, 1, 7) ** 2
    before = f.copy()
    smooth(f, 0.1, 0.1)
    assert (f == before).all()


def test_local_minima_ignores_the_ends_and_flats():
    assert local_minima([0.0, 1.0, 1.0, 1.0, 0.0]).size == 0
    assert local_minima([1.0, 0.0, 1.0, 0.0]).tolist() == [1]
