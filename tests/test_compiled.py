"""compile=True: the same step in one pass, and the law of its noise."""

import copy
import functools
import shutil
from typing import Any

import pytest
import torch
from scipy import stats

import lightning_entropy as le
from lightning_entropy.compiled import LEAST, hashed_normal, inverse_normal

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def keys(a: int, b: int) -> torch.Tensor:
    return torch.tensor([a, b], dtype=torch.int32)


def test_the_noise_is_normal_and_exact() -> None:
    n = hashed_normal(1_000_000, keys(12345, -987))
    assert stats.kstest(n.numpy(), "norm").pvalue > 1e-3
    moments = [n.double().pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    beyond = (n.abs() > 4).sum().item()
    assert beyond == pytest.approx(2e6 * stats.norm.sf(4), abs=5 * (2e6 * stats.norm.sf(4)) ** 0.5)


def test_the_inverse_distribution_function() -> None:
    ends = torch.tensor([-(2.0**23) + 0.5, -0.5, 0.5, 2.0**23 - 0.5]) * 2.0**-23
    u = torch.cat([ends, torch.linspace(-0.99999, 0.99999, 9999)])
    expected = stats.norm.ppf((u.double().numpy() + 1) / 2)
    torch.testing.assert_close(inverse_normal(u).double().numpy(), expected, rtol=2e-6, atol=1e-7)


def test_the_noise_is_independent_over_weights_and_steps() -> None:
    size = 1 << 18
    draws = torch.stack([hashed_normal(size, keys(k, 77 * k + 1)) for k in range(1, 17)]).double()
    limit = 5 / size**0.5
    steps = torch.corrcoef(draws) - torch.eye(len(draws))
    assert steps.abs().max() < limit
    assert torch.corrcoef(draws.square()).fill_diagonal_(0).abs().max() < limit
    for lag in (1, 2, 16, 1024):
        assert (draws[:, lag:] * draws[:, :-lag]).mean(1).abs().max() < limit
    assert torch.equal(hashed_normal(100, keys(3, 4)), hashed_normal(100, keys(3, 4)))


def train(make: Any, relaxation: le.Relaxation, compile: bool, memory_format: Any = None) -> dict[str, Any]:
    torch.manual_seed(0)
    large, small = torch.randn(64, LEAST // 512, 3, 3), torch.randn(7)
    if memory_format is not None:
        large = large.to(memory_format=memory_format)
    params = [torch.nn.Parameter(large), torch.nn.Parameter(small)]
    optimizer = make(params)
    loop = le.relax(optimizer, relaxation, seed=3, compile=compile)
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        gradients = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True)), "the gradients are given back"
    return {
        "params": [p.detach() for p in params],
        "average": loop.average,
        "anchor": loop.anchor,
        "momentum": copy.deepcopy(optimizer.state_dict()["state"]),
    }


@needs_compiler
@pytest.mark.parametrize(
    ("make", "memory_format"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3), None),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.channels_last),
        (functools.partial(torch.optim.SGD, lr=0.1), None),
        (functools.partial(torch.optim.AdamW, lr=0.1), None),
    ],
)
def test_the_step_is_the_same(make: Any, memory_format: Any) -> None:
    relaxation = le.entropy_sgd(4, 0.5, 0.0, 0.75)
    plain, compiled = (train(make, relaxation, compile, memory_format) for compile in (False, True))
    torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_the_noise_has_the_size_of_the_other() -> None:
    make = functools.partial(torch.optim.SGD, lr=0.25, momentum=0.9, nesterov=True)
    quiet = train(make, le.Relaxation(inner_steps=100, gamma=0.5), True)
    noisy = train(make, le.Relaxation(inner_steps=100, gamma=0.5, noise=1e-2), True)
    # Nine steps of an autoregression: y <- y / (1 + k) + sqrt(lr) noise N, k = lr gamma, the gradients alike.
    decay = (1 / (1 + 0.125)) ** 2
    expected = 0.25**0.5 * 1e-2 * sum(decay**i for i in range(9)) ** 0.5
    # The first step is the optimizer's own, its noise the kernel's as well.
    difference = (noisy["params"][0] - quiet["params"][0]).std().item()
    assert difference == pytest.approx(expected, rel=0.02)


@needs_compiler
def test_an_update_that_raises_leaves_no_old_gradient() -> None:

    params = [torch.nn.Parameter(torch.randn(LEAST)), torch.nn.Parameter(torch.randn(7))]
    optimizer = torch.optim.SGD(params, lr=0.1)
    le.relax(optimizer, le.entropy_sgd(4, 0.5, 0.0, 0.75), compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    broken, params[1].grad = params[1].grad, torch.sparse_coo_tensor([[0]], [1.0], (7,), check_invariants=True)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # which torch refuses for sparse gradients, in the update
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert params[0].grad is None
    params[0].grad, params[1].grad = torch.full_like(params[0], 2.0), broken
    optimizer.step()
    assert params[0].grad is not None and params[0].grad[0] == 2
