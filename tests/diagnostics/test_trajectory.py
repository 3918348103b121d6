import numpy as np
import pytest
import scipy.linalg

from lightning_entropy.diagnostics import analyse_trajectory, probability_current
from lightning_entropy.diagnostics.current import autocorrelation, correlation_time
from lightning_entropy.diagnostics.trajectory import ou_control


def linear_sde(matrix, noise, steps, runs, seed):
    """Paths of x(t+1) = M x(t) + N(0, noise), shape (runs, steps, k), from the stationary state; and its covariance."""
    rng = np.random.default_rng(seed)
    covariance = scipy.linalg.solve_discrete_lyapunov(matrix, noise)
    kick, root = np.linalg.cholesky(noise), np.linalg.cholesky(covariance)
    x = rng.normal(size=(runs, len(matrix))) @ root.T
    path = np.empty((runs, steps, len(matrix)))
    for t in range(steps):
        path[:, t] = x
        x = x @ matrix.T + rng.normal(size=x.shape) @ kick.T
    return path, covariance


def drift(rotation):
    return np.eye(3) - 0.1 * np.diag([1.0, 1.5, 2.0]) - np.array([[0, rotation, 0], [-rotation, 0, 0], [0, 0, 0]])


NOISE = 0.01 * np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]])


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


def test_reversible_path_in_many_dimensions_has_none_in_its_principal_planes():
    """Choosing the planes by the data must not invent a current."""
    rng = np.random.default_rng(2)
    turned = 0
    for seed in range(100):
        x, phi = np.zeros(20), np.linspace(0.3, 0.8, 20)
        steps = rng.normal(size=(1200, 20))
        walk = np.empty_like(steps)
        for t in range(1200):
            x = phi * x + steps[t]
            walk[t] = x
        found = analyse_trajectory(walk, seed=seed).current
        assert found.conclusive
        turned += found.p_value < 0.05
    assert turned <= 10


def test_random_walk_is_not_taken_for_a_turn():
    """A diffusing path traces smooth arcs in its own principal planes; it is too short for its memory."""
    for seed in range(20):
        walk = np.cumsum(np.random.default_rng(seed).normal(size=(1000, 50)), 0)
        assert not analyse_trajectory(walk).current.conclusive


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


def test_control_has_the_path_s_variance_and_memory():
    path, covariance = linear_sde(np.diag([0.9, 0.5]), np.eye(2), 20_000, 1, 5)
    control = ou_control(path[0], np.random.default_rng(0))
    np.testing.assert_allclose(control.var(0), np.diag(covariance), rtol=0.1)
    np.testing.assert_allclose(autocorrelation(control, 2)[1], [0.9, 0.5], atol=0.02)


def test_white_increments_have_a_flat_spectrum():
    steps = np.random.default_rng(6).normal(size=(2048, 200))
    found = analyse_trajectory(np.cumsum(steps, 0), interval=3)
    # |Fourier amplitude| of unit white noise is Rayleigh distributed, of mean sqrt(pi) / 2.
    np.testing.assert_allclose(found.amplitudes[:-1], np.sqrt(np.pi) / 2, atol=0.15)
    assert found.frequencies[-1] == pytest.approx(0.5 / 3, rel=1e-2)
    assert found.lags[1] == 3


def test_a_turn_stands_out_of_the_spectrum():
    turn = np.arange(2000)[:, None] * 2 * np.pi / 50
    noise = np.random.default_rng(7).normal(size=(2000, 10)) / 5
    found = analyse_trajectory(np.hstack([np.cos(turn), np.sin(turn), np.zeros((2000, 8))]) + noise)
    assert found.frequencies[found.amplitude_stds.argmax()] == pytest.approx(1 / 50, rel=0.02)
    assert found.current.p_value < 0.01 < found.control_current.p_value


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (np.zeros((10, 3)), {}, "snapshots must be at least 64"),
        (np.zeros((100, 1)), {}, "snapshots must be at least 64 of at least 2"),
        (np.full((100, 3), np.nan), {}, "snapshots must be finite"),
        (np.zeros((100, 3)), {}, "snapshots must move"),
        (np.zeros((100, 3)), {"interval": 0}, "interval must be at least 1, got 0"),
        (np.zeros((100, 3)), {"components": 1}, "components must be at least 2, got 1"),
    ],
)
def test_bad_input(path, change, message):
    with pytest.raises(ValueError, match=message):
        analyse_trajectory(path, **change)
    with pytest.raises(ValueError, match="path must have at least 32 steps"):
        probability_current(np.zeros((10, 2)))


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    from lightning_entropy.diagnostics.diagnostic import draw

    walk = np.cumsum(np.random.default_rng(8).normal(size=(100, 5)), 0)
    figure = draw(analyse_trajectory(walk))
    assert len(figure.axes) == 4  # Three panels and a colour bar.
    figure.savefig("/dev/null", format="png")


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
