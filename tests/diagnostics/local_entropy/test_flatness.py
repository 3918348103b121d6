import numpy as np
import torch

from lightning_entropy.diagnostics import flatness_profile
from tests.diagnostics import tiny


def test_profile_keeps_its_error_bars():
    """E f(sigma xi) = sigma^2 tr(H) / 2 + 3/4 sigma^4 for f = x.Hx/2 + x_0^4 / 4."""
    curvature = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    hits = 0
    for seed in range(200):
        found = flatness_profile(
            tiny.Point(0.0, 0.0, 0.0),
            [torch.zeros(1)],
            [0.3, 0.6],
            loss=lambda m, b: (curvature * m.x.square()).sum() / 2 + m.x[0] ** 4 / 4,
            draws=40,
            seed=seed,
        )
        want = 5.5 / 2 * found.sigmas**2 + 0.75 * found.sigmas**4
        hits += (np.abs(found.rises - want) <= found.errors).mean()
    assert hits >= 190
