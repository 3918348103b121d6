"""gamma="auto" against what one computes by hand."""

import pytest
import torch

import lightning_entropy as le


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
