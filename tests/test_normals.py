"""The table's numbers: their exact law, of which samples tell little, and how they are drawn."""

import pytest
import torch
from scipy import stats

from lightning_entropy.normals import Normals, table


def test_the_law_of_a_sum_of_four_is_normal() -> None:
    values = table().double()
    assert len(torch.unique(values)) == 1 << 16
    t = torch.linspace(0, 12, 481, dtype=torch.float64)
    characteristic = torch.stack([torch.cos(s * values).mean() for s in t]) ** 4
    torch.testing.assert_close(characteristic, torch.exp(-t.square() / 2), rtol=0, atol=2e-6)
    second, fourth = values.square().mean(), values.pow(4).mean()
    assert 4 * second.item() == pytest.approx(1, abs=1e-6)
    assert 3 + (fourth / second**2 - 3).item() / 4 == pytest.approx(3, abs=5e-5)


@pytest.mark.parametrize(("at", "error"), [(3, 1e-3), (4, 1e-2), (5, 4e-2)])
def test_the_tails_are_right(at: int, error: float) -> None:
    """exp(at S) weighs the neighbourhood of S = at."""
    tilted = torch.exp(at * table().double()).mean().item() ** 4
    assert tilted * stats.norm.cdf(0) * 2 == pytest.approx(torch.tensor(at**2 / 2).exp().item(), rel=error)


def test_four_numbers_are_the_signed_sums_of_four_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_entropy.normals.table", lambda: torch.arange(1 << 16, dtype=torch.float32))
    normals = Normals(8)
    normals.seed(3)
    a, b, c, d = normals.draw(4).tolist()
    draws = [(a + b + c + d) / 4, (a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4]
    assert all(v == int(v) and 0 <= v < 1 << 16 for v in draws)
    assert len(set(draws)) == 4


@pytest.mark.parametrize("n", [1, 3, 4, 5, 1001])
def test_any_number_can_be_drawn_and_none_is_zero(n: int) -> None:
    normals = Normals(1001)
    normals.seed(0)
    drawn = normals.draw(n)
    assert drawn.shape == (n,)
    assert drawn.count_nonzero() == n


def test_pairs_are_independent() -> None:
    """Over the pairs within a draw of four, where sums of something not normal would not be."""
    normals = Normals(1 << 20)
    normals.seed(1)
    four = normals.draw(1 << 20).view(4, -1).double()
    for f in (lambda x: x, torch.abs, torch.square):
        correlations = torch.corrcoef(f(four)).fill_diagonal_(0)
        assert correlations.abs().max() < 4.5 / four.shape[1] ** 0.5
    extreme = four[1:][:, four[0].abs() > 2.5].flatten()
    assert stats.kstest(extreme.numpy(), "norm").pvalue > 1e-3


def test_another_default_type_or_device_changes_nothing() -> None:
    normals = Normals(8)
    normals.seed(0)
    expected = normals.draw(8)
    table.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            others = Normals(8)
            others.seed(0)
            assert torch.equal(others.draw(8), expected)
    finally:
        torch.set_default_dtype(torch.float32)
