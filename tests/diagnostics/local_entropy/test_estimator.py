import math

import numpy as np
import pytest
import torch

from lightning_entropy.diagnostics import flatness_profile, local_entropy
from tests.diagnostics import tiny


def test_public_function_agrees_with_the_closed_form():
    found = local_entropy(
        tiny.Point(0.5, 0.0),
        [torch.zeros(1)],
        loss=lambda m, b: (m.x.square() * m.x.new_tensor([3.0, 1.0])).sum() / 2,
        gamma=1.0,
        temperature=0.05,
        samples=40,
        chains=6,
        sigmas=[0.1, 0.2],
        draws=64,
    )
    rise = -0.5 * 9 * 0.25 / 4 + 0.025 * (math.log(4) + math.log(2))
    assert abs(found.rise - rise) < found.rise_error < 0.1
    assert np.abs(found.gradient - [0.375, 0.0]).max() < 4.03 * found.gradient_stderr.max()
    assert found.gradient_norm == pytest.approx(0.375, abs=0.05)
    volume = math.log(2 * math.pi * 0.05)
    assert found.local_entropy == pytest.approx(volume - (0.375 + found.rise) / 0.05)
    np.testing.assert_array_less(np.abs(found.profile.rises - np.array([0.1, 0.2]) ** 2 * 2), found.profile.errors)


def test_narrow_valley_rises_more():
    def rise(curvature):
        point, loss = tiny.Point(0.0), lambda m, b: curvature * m.x.square().sum()
        return local_entropy(point, [torch.zeros(1)], loss=loss, samples=20, warmup=10).rise

    assert rise(50.0) > rise(1.0) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "gamma must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"chains": 1}, "chains must be at least 2, got 1"),
        ({"sigmas": [0.0]}, "sigmas must be positive numbers"),
        ({"rungs": 3, "temperature": 1e-9}, "rungs must be enough"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        local_entropy(tiny.net(), tiny.data(), samples=2, warmup=1, **change)
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        flatness_profile(tiny.net(), tiny.data(), [0.1], draws=1)


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = local_entropy(tiny.net(), tiny.data(), samples=4, warmup=2, chains=2, leaps=1, sigmas=[0.01, 0.1])
    for result in (found, found.profile):
        figure, _ = result.plot()
        figure.canvas.draw()
    # At a maximum all rises are negative: nothing for logarithmic axes, and the picture says so.
    figure, axes = local_entropy(
        tiny.Point(0.0), [torch.zeros(1)], loss=lambda m, b: -m.x.square().sum() / 2, gamma=10.0, samples=20, warmup=5
    ).plot()
    assert "below f(x)" in axes.texts[-1].get_text()
    figure.canvas.draw()
    plt.close("all")
