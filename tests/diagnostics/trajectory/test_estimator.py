import numpy as np
import pytest

from lightning_entropy.diagnostics import analyse_trajectory, probability_current


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
    from lightning_entropy.diagnostics.callback import draw

    walk = np.cumsum(np.random.default_rng(8).normal(size=(100, 5)), 0)
    figure = draw(analyse_trajectory(walk))
    assert len(figure.axes) == 4  # Three panels and a colour bar.
    figure.savefig("/dev/null", format="png")
