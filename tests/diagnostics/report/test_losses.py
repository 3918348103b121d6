import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_entropy.diagnostics.estimate import Estimate, GroupValues, student
from lightning_entropy.diagnostics.report.findings import Findings
from lightning_entropy.diagnostics.report.losses import loss_and_error
from lightning_entropy.diagnostics.report.rows import ROWS, Row, difference, smaller
from lightning_entropy.diagnostics.report.verdict import verdict
from tests.diagnostics import tiny


def scores(net, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return net(x).detach(), y


def summed(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def smoothed(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)


def test_loss_and_error_of_every_example():
    net, batches = tiny.net(), tiny.data()
    found = loss_and_error(net, {"train": batches, "val": batches[:2]})
    logits, y = scores(net, batches)
    each = nn.functional.cross_entropy(logits, y, reduction="none")
    loss = found.splits["train"].losses.estimate
    assert loss.value == pytest.approx(each.mean().item(), rel=1e-9)
    assert loss.stderr == pytest.approx(each.std().item() / math.sqrt(len(y)), rel=1e-9)
    wrong = found.splits["train"].wrong.estimate
    assert wrong.value == pytest.approx((logits.argmax(1) != y).double().mean().item(), rel=1e-12)
    p = wrong.value
    assert wrong.stderr == pytest.approx(math.sqrt(p * (1 - p) / (len(y) - 1)), rel=1e-9)
    assert found.splits["val"].examples == 16
    assert list(found.numbers()) == ["training loss", "training error, %", "validation loss", "validation error, %"]


def test_a_loss_of_ones_own_is_cut_into_its_examples():
    net, batches = tiny.net(), tiny.data()
    found = loss_and_error(net, {"val": batches}, loss=smoothed).splits["val"]
    logits, y = scores(net, batches)
    each = nn.functional.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
    np.testing.assert_allclose(found.losses.values, each.numpy(), rtol=1e-9)
    assert found.unit == "example" and found.wrong is not None


def test_a_loss_that_is_no_mean_has_the_scatter_of_its_batches():
    net, batches = tiny.net(), tiny.data(32)
    found = loss_and_error(net, {"val": batches}, loss=summed).splits["val"]
    values = torch.stack([summed(net, batch).detach() for batch in batches])
    assert found.unit == "batch"
    assert found.losses.estimate.stderr == pytest.approx(values.std().item() / 2, rel=1e-9)
    assert math.isnan(loss_and_error(net, {"val": batches[:1]}, loss=summed).splits["val"].losses.estimate.stderr)


def test_regression_has_no_error_rate():
    net = nn.Linear(5, 3).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    found = loss_and_error(
        net, {"train": [(x, net(x).detach() + 1)]}, loss=lambda m, b: (m(b[0]) - b[1]).square().mean()
    )
    assert found.splits["train"].wrong is None
    assert found.splits["train"].losses.estimate.value == pytest.approx(1.0)


def test_no_error_in_n_is_known_to_within_the_rule_of_three():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    batch = torch.eye(2).repeat(50, 1), torch.arange(2).repeat(50)
    _, row = ROWS["loss"](loss_and_error(net, {"train": [batch]}))
    assert row.value == 0
    assert (1 - row.error / 100) ** 100 == pytest.approx(0.01, rel=0.15), "so many errors show in 99 % of cases"


def test_weighted_groups_are_a_mean_of_clusters():
    values, sizes = np.array([1.0, 2.0, 4.0]), np.array([2, 2, 4])
    found = GroupValues(values, sizes / 8).estimate
    assert found.value == 2.75
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum((sizes / 8) ** 2 * (values - 2.75) ** 2)))
    alike = GroupValues(values, np.full(3, 1 / 3)).estimate
    assert alike.stderr == pytest.approx(Estimate.of(torch.from_numpy(values)).stderr)


def test_pairs_of_examples_tell_what_two_error_bars_do_not():
    """Hard examples are hard for both: their scatter cancels in the difference."""
    hard = np.random.default_rng(0).exponential(size=200)
    shares = np.full(200, 1 / 200)
    first, second = (Row("training loss", Estimate(v.mean()), "", "lower loss", GroupValues(v, shares))
                     for v in (hard, hard - 0.05 + 0.01 * np.sin(np.arange(200))))  # fmt: skip
    assert first.error > 0.05
    gap = difference(first, second)
    assert gap.value == pytest.approx(-0.05, abs=1e-3)
    apart = 0.01 * np.sin(np.arange(200))
    assert gap.stderr == pytest.approx(apart.std(ddof=1) / math.sqrt(200))
    assert gap.error < 0.01
    assert smaller(first, second) == 1
    unpaired = replace(first, groups=GroupValues(hard[:100], np.full(100, 0.01)))
    assert smaller(unpaired, second) is None


@pytest.mark.parametrize(("gap", "best"), [(2.5, None), (2.6, 0), (-2.6, 1)])
def test_a_verdict_needs_a_difference_beyond_its_interval(gap, best):
    """With a standard error of 1 that is 2.576, which is more than twice it."""
    first = Row("trace", Estimate(10.0, 0.6), "", "flatter")
    second = Row("trace", Estimate(10.0 + gap, 0.8), "", "flatter")
    assert smaller(first, second) == best
    assert smaller(replace(first, better=None), replace(second, better=None)) is None


def test_errors_add_in_squares_with_welchs_degrees_of_freedom():
    a, b = Estimate(0.0, 2.0, 4), Estimate(0.0, 1.0, 9)
    found = a.widened(b)
    assert found.stderr**2 == pytest.approx(5)
    assert found.dof == pytest.approx(25 / (16 / 4 + 1 / 9))
    assert Estimate(1.0, 2.0, 4).widened(Estimate(3.0)) == Estimate(1.0, 2.0, 4)
    assert math.isnan(a.widened(Estimate(0.0, math.nan)).error)
    assert a.error == pytest.approx(2 * student(4))


def test_the_verdict_says_where_there_is_none():
    net = tiny.net()
    result = loss_and_error(net, {"train": tiny.data()})
    one, two = Findings("a", {"loss": result}), Findings("b", {"loss": result})
    assert verdict(one, two) == [
        "Training loss: no difference beyond the error (0).",
        "Training error, %: no difference beyond the error (0).",
    ]
    better = tiny.net()
    with torch.no_grad():
        better[-1].weight.zero_()
        better[-1].bias.copy_(torch.tensor([0.0, 30.0, 0.0]))  # confident, and mostly wrong
    other = Findings("b", {"loss": loss_and_error(better, {"train": tiny.data()})})
    assert "a is lower" in verdict(one, other)[0]
