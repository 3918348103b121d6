"""gamma="auto" against what one computes by hand."""

import math

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.engine.auto_gamma import GammaMeasurement
from lightning_entropy.engine.weight import Weight


def test_auto_gamma_is_what_one_computes_by_hand() -> None:
    """Gradients (1, 0), (0, 2), (3, 0) on one weight pair: mean (4/3, 2/3); lr = 0.5, so x - z = (2, 1)."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.5)
    loop = le.relax(optimizer, le.hamilton_jacobi(3, le.Scoping("auto", 0.5)))
    for i, g in enumerate(([1.0, 0.0], [0.0, 2.0], [3.0, 0.0])):
        assert loop.settings.gamma == 0
        assert loop.gamma_start is None, i
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert loop.gamma_start == pytest.approx((16 / 9 + 4 / 9) ** 0.5 / 5**0.5, rel=1e-12)
    assert loop.gamma_start == pytest.approx(2 / 3, rel=1e-12)
    gammas = []
    for _ in range(2):
        for _ in range(3):
            w.grad = torch.ones(2, dtype=torch.float64)
            optimizer.step()
        gammas.append(loop.settings.gamma)
    assert gammas == pytest.approx([2 / 3, 1.0], rel=1e-12)


def test_auto_gamma_measures_again_where_nothing_moved() -> None:
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.hamilton_jacobi(2, "auto"))
    for g in (0.0, 0.0, 1.0, 1.0):
        assert loop.gamma_start is None
        w.grad = torch.full((1,), g)
        optimizer.step()
    assert loop.gamma_start == pytest.approx(0.5)  # |mean gradient| 1, distance 2


def moved(x: list[float], z: list[float]) -> Weight:
    return Weight(torch.nn.Parameter(torch.tensor(z)), torch.tensor(x))


def test_the_measurement_over_several_weights_scaled_gradients_and_missing_ones() -> None:
    """Gradients (3, 4) at twice their size and (3, 4) at theirs: their sum 9 / 2 and 6 over 2; x - z = (2, 0)."""
    a, b = moved([2.0], [0.0]), moved([1.0], [1.0])
    measurement = GammaMeasurement()
    a.param.grad, b.param.grad = torch.tensor([3.0]), torch.tensor([4.0])
    measurement.add([a, b], torch.tensor(2.0))
    measurement.add([a, b], None)
    assert measurement.count == 2
    assert measurement.take([a, b]) == pytest.approx((4.5**2 + 6**2) ** 0.5 / (2 * 2))
    assert (measurement.count, a.gradient, b.gradient) == (0, None, None)
    assert measurement.take([a, b]) is None


@pytest.mark.parametrize(("gradient", "z"), [(0.0, 0.0), (1.0, 1.0), (math.inf, 0.0), (math.nan, 0.0), (1.0, math.inf)])
def test_what_is_not_a_stiffness_is_none(gradient: float, z: float) -> None:
    """No gradient, no move, or no finite number of either."""
    w = moved([1.0], [z])
    w.param.grad = torch.tensor([gradient])
    measurement = GammaMeasurement()
    measurement.add([w], None)
    assert measurement.take([w]) is None
