import numpy as np
import pytest

from lightning_entropy.diagnostics import probability_current
from lightning_entropy.diagnostics.trajectory.current import autocorrelation, correlation_time
from tests.diagnostics.trajectory.linear import NOISE, drift, linear_sde


@pytest.mark.parametrize("rotation", [0.1, -0.1])
def test_current_has_the_right_sign_and_size(rotation):
    """E[x(t) x(t+1)^T] = C M^T, so the areas are its antisymmetric part."""
    matrix = drift(rotation)
    paths, covariance = linear_sde(matrix, NOISE, 4000, 40, 0)
    want = (covariance @ matrix.T - matrix @ covariance) / 2
    found = [probability_current(path, shuffles=400) for path in paths]
    pooled = np.mean([f.areas for f in found], 0)
    assert np.sign(pooled[0, 1]) == np.sign(want[0, 1])
    np.testing.assert_allclose(pooled[0, 1], want[0, 1], rtol=0.05)
    inside = [np.abs(f.areas - want)[0, 1] <= 2.6 * f.stderrs[0, 1] for f in found]
    assert np.mean(inside) >= 0.9
    assert np.mean([f.p_value < 0.01 for f in found]) >= 0.95


def test_reversible_path_has_no_current():
    """M and the noise commute (M symmetric, noise isotropic): detailed balance. Found at 5 % in at most 5 % of 200."""
    matrix = np.eye(3) - 0.1 * np.array([[1.0, 0.4, 0.0], [0.4, 1.5, 0.2], [0.0, 0.2, 2.0]])
    paths, covariance = linear_sde(matrix, 0.01 * np.eye(3), 2000, 200, 1)
    assert np.abs(covariance @ matrix.T - matrix @ covariance).max() < 1e-12
    found = [probability_current(path, shuffles=400) for path in paths]
    assert all(f.conclusive for f in found)
    # Found at the 1 % level, as "p < 0.01": 200 tries, fewer than 10.
    assert sum(f.p_value < 0.01 for f in found) <= 10
    assert 0.01 <= np.mean([f.p_value < 0.05 for f in found]) <= 0.1  # And the level is what it says.


def test_a_path_of_few_correlation_times_gets_no_verdict():
    """A memory of 100 steps wants 6,400."""
    long, _ = linear_sde(0.99 * np.eye(2), np.eye(2), 20_000, 1, 9)
    assert probability_current(long[0]).conclusive
    assert not probability_current(long[0][:3000]).conclusive


def test_backwards_is_minus():
    path, _ = linear_sde(drift(0.1), NOISE, 1000, 1, 3)
    forth, back = probability_current(path[0]), probability_current(path[0][::-1])
    np.testing.assert_allclose(forth.areas, -back.areas, atol=1e-15)
    np.testing.assert_allclose(forth.areas, -forth.areas.T)


def test_autocorrelation_and_its_time():
    phi = 0.8
    path, _ = linear_sde(phi * np.eye(2), np.eye(2), 50_000, 1, 4)
    np.testing.assert_allclose(autocorrelation(path[0], 6)[:, 0], phi ** np.arange(6), atol=0.03)
    assert correlation_time(path[0][:, 0]) == pytest.approx(0.5 + phi / (1 - phi), rel=0.1)


@pytest.mark.parametrize(
    ("walk", "verdict"),
    [
        (np.stack([np.cos(np.arange(500)), np.sin(np.arange(500))], 1), "it turns: p = "),
        (np.random.default_rng(8).normal(size=(500, 2)), "no turn found: p = "),
        (np.arange(100)[:, None] * [1.0, 2.0], "too short to say: it still drifts"),
    ],
)
def test_a_current_says_what_it_found(walk, verdict):
    import matplotlib

    matplotlib.use("Agg")
    figure, axes = probability_current(walk).plot()
    assert axes.get_title().startswith(verdict)
    figure.canvas.draw()
    matplotlib.pyplot.close(figure)
