"""What the choice of examples does to local entropy, the flatness profile and the gradient noise."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_entropy.diagnostics import flatness_profile, gradient_noise, local_entropy
from tests.diagnostics import tiny

CURVATURES = torch.linspace(1.0, 5.0, 32, dtype=torch.float64)
BATCHES = list(CURVATURES.split(8))
WHOLE = [CURVATURES]
MEANS = CURVATURES.view(4, 8).mean(1).numpy()  # of four groups


class Bowl(nn.Module):
    def __init__(self, start: float = 0.0, size: int = 6) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((size,), start, dtype=torch.float64))


def bowl(module, curvatures):
    """f = mean c |x|^2 / 2 over examples with a curvature c each."""
    return curvatures.mean() * module.x.square().sum() / 2


def test_the_profiles_error_is_the_scatter_of_the_groups_curvatures():
    found = flatness_profile(Bowl(), BATCHES, [0.1, 0.2], draws=400, loss=bowl, groups=4)
    for sigma, groups in zip(found.sigmas, found.groups, strict=True):
        np.testing.assert_allclose(groups.values, sigma**2 * 6 / 2 * MEANS, rtol=0.1)
        expected = sigma**2 * 6 / 2 * MEANS.std(ddof=1) / 2
        assert groups.estimate.stderr == pytest.approx(expected, rel=0.1)
    before = flatness_profile(Bowl(), BATCHES, [0.1, 0.2], draws=400, loss=bowl)
    np.testing.assert_allclose(found.rises, before.rises)
    np.testing.assert_allclose([e.error for e in found.draws], before.errors)
    assert (found.errors > before.errors).all()
    assert before.groups == ()


def test_local_entropys_error_is_to_first_order_that_of_the_curvature():
    t, gamma = 0.01, 2.0
    found = local_entropy(Bowl(), WHOLE, loss=bowl, gamma=gamma, temperature=t, samples=80, chains=6, groups=4)
    c = CURVATURES.mean().item()
    assert abs(found.rise - 6 * t / 2 * math.log(1 + c / gamma)) <= found.rise_error
    # d/dc_g of it is <|x|^2> / 2, with |x|^2 = 6 T / (c + gamma) under the Gibbs measure.
    np.testing.assert_allclose(found.groups[0].values, MEANS / 2 * 6 * t / (c + gamma), rtol=0.1)
    assert found.rise_error == pytest.approx(math.hypot(found.chain_errors[0], found.groups[0].estimate.error))
    assert len(found.groups) == len(found.gammas)
    figure, _ = found.plot()
    figure.canvas.draw()


def test_the_norm_of_the_gradient_has_the_error_of_its_chains():
    one, gamma = Bowl(start=0.5), 2.0
    found = local_entropy(one, WHOLE, loss=bowl, gamma=gamma, temperature=0.1, samples=40, chains=6)
    c = CURVATURES.mean().item()
    truth = gamma * c / (c + gamma) * 0.5 * math.sqrt(6)
    assert 0 < found.gradient_norm_error < truth
    assert abs(found.gradient_norm - truth) <= found.gradient_norm_error
    two = local_entropy(one, WHOLE, loss=bowl, gamma=gamma, temperature=0.1, samples=5, chains=2)
    assert math.isnan(two.gradient_norm_error)


@pytest.mark.parametrize("examples", [24, 64], ids=["gram", "dense"])
def test_the_noise_without_a_group_is_that_of_the_others(examples):
    net, batches = tiny.net(), tiny.data(examples)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = gradient_noise(net, batches, groups=4)
    assert len(found.left_out) == 4
    size = examples // 4
    for g, other in enumerate(found.left_out):
        kept = torch.cat([torch.arange(g * size), torch.arange((g + 1) * size, examples)])
        literal = gradient_noise(net, [(x[kept], y[kept])])
        n = min(len(other.eigenvalues), len(literal.eigenvalues))
        np.testing.assert_allclose(other.eigenvalues[:n], literal.eigenvalues[:n], atol=1e-9)
        assert other.trace == pytest.approx(literal.trace)
        assert other.stable_rank == pytest.approx(literal.stable_rank)
    figure, _ = found.plot()
    figure.canvas.draw()


def test_the_jackknifes_error_of_the_trace_is_that_of_a_mean():
    """The trace is a mean of squared distances: the pseudo-values' scatter is the standard error of it, nearly."""
    net, batches = tiny.net(), tiny.data(240, 24)
    found = gradient_noise(net, batches, groups=60)
    each = [torch.cat([g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(net(a[None]), b[None]),
                                                              [*net.parameters()])])
            for x, y in batches for a, b in zip(x, y, strict=True)]  # fmt: skip
    gradients = torch.stack(each)
    squares = (gradients - gradients.mean(0)).square().sum(1)
    assert found.trace == pytest.approx(squares.mean().item())
    assert found.estimate("trace").stderr == pytest.approx(squares.std().item() / math.sqrt(240), rel=0.25)
    assert found.estimate("stable_rank").error > 0
    assert gradient_noise(net, batches).estimate("trace").error == 0
    figure, _ = found.plot()
    figure.canvas.draw()


@pytest.mark.parametrize("estimator", [gradient_noise, local_entropy])
def test_one_group_is_none(estimator):
    with pytest.raises(ValueError, match="groups must be 0 or at least 2, got 1"):
        estimator(tiny.net(), tiny.data(), groups=1)
