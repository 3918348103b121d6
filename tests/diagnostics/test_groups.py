import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightning_entropy.diagnostics import hessian_spectrum
from lightning_entropy.diagnostics.groups import Groups
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched
from tests.diagnostics import tiny


def hessian_of(batches):
    net = tiny.net()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return torch.autograd.functional.hessian(tiny.flat_loss(net, batches), weights)


def in_groups(count, examples=30):
    x, y = (torch.cat(parts) for parts in zip(*tiny.data(examples), strict=True))
    borders = [round(examples * g / count) for g in range(count + 1)]
    return [[(x[a:b], y[a:b])] for a, b in pairwise(borders)]


def test_groups_have_equal_sizes_across_the_borders_of_batches():
    with untouched(net := tiny.net()):
        groups = Groups(surface := LossSurface(net, tiny.data()), 4)
        assert (groups.shares * 30).tolist() == [8, 7, 7, 8]
        products = torch.stack([*groups.hessian_products(torch.eye(39, dtype=torch.float64))])
        for found, batches in zip(products, in_groups(4), strict=True):
            torch.testing.assert_close(found, hessian_of(batches))
        whole = torch.einsum("g,gij->ij", torch.from_numpy(groups.shares), products)
        torch.testing.assert_close(whole, surface.hessian_products(surface.weights, torch.eye(39, dtype=torch.float64)))
        losses = groups.losses(surface.weights)
        assert losses.numpy() @ groups.shares == pytest.approx(surface.value)


def test_examples_drawn_anew_weigh_as_often_as_they_are_drawn():
    with untouched(net := tiny.net()):
        groups = Groups(LossSurface(net, tiny.data()), 3)
        counts = groups.resampling(2, seed=5)
        assert counts.sum(1).tolist() == [3, 3]
        vector = torch.randn(1, 39, dtype=torch.float64)
        found = groups.resampled_products(vector.repeat(2, 1), counts)
        for k in range(2):
            batches = [b for g, n in zip(in_groups(3), counts[k], strict=True) for b in g * int(n)]
            torch.testing.assert_close(found[k], hessian_of(batches) @ vector[0])


def test_in_train_mode_groups_are_of_whole_batches():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with untouched(net, "train"):
        groups = Groups(LossSurface(net, tiny.data(), mode="train"), 3)
        assert (groups.shares * 30).round(9).tolist() == [16, 8, 6]
        assert len(Groups(LossSurface(net, tiny.data(), mode="train"), 100)) == 4
        assert len(Groups(LossSurface(net, tiny.data(30, 30), mode="train"), 4)) == 0


@pytest.mark.parametrize("dense_limit", [0, 1000])
def test_errors_of_eigenvalue_and_trace_are_the_scatter_of_groups(dense_limit):
    net = tiny.net()
    options = {"top": 2, "bottom": 1, "probes": 200, "steps": 10, "dense_limit": dense_limit}
    found = hessian_spectrum(net, tiny.data(), groups=5, **options)
    whole = hessian_of(tiny.data())
    values, vectors = torch.linalg.eigh(whole)
    each = [hessian_of(batches) for batches in in_groups(5)]
    top = torch.stack([vectors[:, -1] @ h @ vectors[:, -1] for h in each])
    np.testing.assert_allclose(found.eigenvalue_groups(0).values, top.numpy(), rtol=1e-3)
    estimate = found.eigenvalue_estimate(0)
    assert estimate.value == pytest.approx(values[-1].item(), rel=1e-4)
    assert estimate.stderr == pytest.approx(top.std().item() / math.sqrt(5), rel=1e-3)
    traces = np.array([h.trace().item() for h in each])
    tolerance = 1e-6 if dense_limit else 0.25
    assert found.trace_groups.estimate.stderr == pytest.approx(traces.std(ddof=1) / math.sqrt(5), rel=tolerance)
    assert found.trace_estimate.stderr >= found.trace_groups.estimate.stderr
    assert found.scalars()["largest_error"] == estimate.error
    before = hessian_spectrum(net, tiny.data(), **options)
    np.testing.assert_allclose(found.density, before.density, rtol=1e-5)
    assert (found.density_errors + 1e-12 >= before.density_errors).all()
    assert found.density_errors.max() > 1.1 * before.density_errors.max()
    low, high = found.near_zero(1e-2)
    assert low <= before.near_zero(1e-2)[0] and high >= before.near_zero(1e-2)[1]
    figure, _ = found.plot()
    figure.canvas.draw()


def test_the_error_of_the_top_eigenvalue_covers_that_of_the_population():
    """Of thirty choices of 200 among 20,000 examples the 99 % interval holds the eigenvalue of all but for a few."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5])
    truth = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()
    net = nn.Linear(3, 1, bias=False).double()

    def square(module, batch):
        return module(batch).square().mean() / 2

    held, errors = 0, []
    for i in range(30):
        found = hessian_spectrum(net, [x[200 * i : 200 * (i + 1)]], loss=square, groups=16).eigenvalue_estimate(0)
        held += abs(found.value - truth) <= found.error
        errors.append(found.stderr)
    assert held >= 27
    # The variance of (u . x)^2, whose mean over 200 is the eigenvalue: 2 lambda^2.
    assert np.mean(errors) == pytest.approx(math.sqrt(2 / 200) * truth, rel=0.2)


def test_the_error_of_the_density_grows_where_examples_differ():
    """All examples alike: none of the error is of their choice."""
    net = tiny.net()
    (x, y), *_ = tiny.data()
    same = [(x[:1].repeat(32, 1), y[:1].repeat(32))]
    alike = hessian_spectrum(net, same, groups=8, dense_limit=1000)
    assert alike.density_errors.max() < 1e-6 * alike.density.max()
    assert alike.eigenvalue_estimate(0).error < 1e-6
    other = hessian_spectrum(net, tiny.data(32), groups=8, dense_limit=1000)
    assert other.density_errors.max() > 0.1 * other.density.max()


def test_bad_groups():
    with pytest.raises(ValueError, match="groups must be 0 or at least 2, got 1"):
        hessian_spectrum(tiny.net(), tiny.data(), groups=1)
