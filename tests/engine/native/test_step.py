"""compile=True: the same step in one pass, and the law of its noise."""

import copy
import ctypes
import functools
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import lightning_entropy as le
from lightning_entropy.engine.arithmetic import Move, inner_move_
from lightning_entropy.engine.native import build, step
from lightning_entropy.engine.noise import NoiseStreams

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compile=True needs a C++ compiler"
)
LARGE = (1 << 17) + 2  # shared by threads, and no whole number of tiles


def call(name: str, *arguments: Any) -> None:
    """Call one of the kernel's functions that are there to be tested; the first array says how many numbers."""
    size = arguments[-1].numel()
    pointers = [ctypes.c_void_p(a.ctypes.data if isinstance(a, np.ndarray) else a.data_ptr()) for a in arguments]
    getattr(build.kernel(), name)(ctypes.c_int64(size), *pointers)


def hashed_normal(n: int, *keys: int) -> torch.Tensor:
    """The noise of a parameter of n weights."""
    out = torch.empty(n)
    call("normals", np.array(keys).astype(np.uint32), out)
    return out


def hashed_pairs(n: int, *keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two numbers of every pair: in each tile of 1,024 the first half and the second."""
    tiles = hashed_normal(2 * n, *keys).view(-1, 2, 512)
    return tiles[:, 0].flatten(), tiles[:, 1].flatten()


def log(u: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(u)
    call("logarithms", u, out)
    return out


def test_the_noise_is_normal_and_exact() -> None:
    n = hashed_normal(1_000_000, 12345, -987)
    assert stats.kstest(n.numpy(), "norm").pvalue > 1e-3
    moments = [n.double().pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    beyond = (n.abs() > 4).sum().item()
    assert beyond == pytest.approx(2e6 * stats.norm.sf(4), abs=5 * (2e6 * stats.norm.sf(4)) ** 0.5)


def test_the_logarithm() -> None:
    ends = torch.tensor([2.0**-25, 0.5**0.5, 1 - 2.0**-24, 1.0, 2.0**100])
    u = torch.cat([ends, torch.linspace(1e-6, 4, 9999), torch.linspace(0.7, 0.72, 999)])
    torch.testing.assert_close(log(u).double(), u.double().log(), rtol=3e-7, atol=0)


def test_no_radius_is_the_root_of_a_negative_number() -> None:
    u = torch.arange(1 << 24).to(torch.float32) * 2.0**-24 + 2.0**-25  # all there are
    assert (log(u) <= 0).all()


def test_the_angle() -> None:
    v = torch.linspace(-1, 1, 9999)
    cosine, sine = torch.empty_like(v), torch.empty_like(v)
    call("octants", v, cosine, sine)
    angle = v.double() * torch.pi / 4
    torch.testing.assert_close(cosine.double(), angle.cos(), rtol=2e-7, atol=0)
    torch.testing.assert_close(sine.double(), angle.sin(), rtol=2e-7, atol=0)


def test_the_two_of_a_pair_are_independent() -> None:
    """Box and Muller's angle is uniform, whatever the radius: also of the large ones, and with its signs."""
    a, b = hashed_pairs(512 * 2000, 5, -6)
    for left, right in ((a, b), (a.abs(), b), (a, b.abs()), (a.square(), b.square())):
        assert torch.corrcoef(torch.stack([left, right]).double())[0, 1].abs() < 4e-3
    angle = torch.atan2(b, a).double() / (2 * torch.pi) + 0.5
    radius = torch.exp(-(a.double().square() + b.double().square()) / 2)
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(radius.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(angle[radius < 0.05].numpy(), "uniform").pvalue > 1e-3


def test_the_noise_is_independent_over_weights_and_steps() -> None:
    size = 1 << 18
    draws = torch.stack([hashed_normal(size, k, 77 * k + 1) for k in range(1, 17)]).double()
    limit = 5 / size**0.5
    steps = torch.corrcoef(draws) - torch.eye(len(draws))
    assert steps.abs().max() < limit
    assert torch.corrcoef(draws.square()).fill_diagonal_(0).abs().max() < limit
    for lag in (1, 2, 16, 1024):
        assert (draws[:, lag:] * draws[:, :-lag]).mean(1).abs().max() < limit
    assert torch.equal(hashed_normal(100, 3, 4), hashed_normal(100, 3, 4))


def train(
    make: Any, relaxation: le.Relaxation, compile: bool, memory_format: Any = None, *, channels: int = 231
) -> dict[str, Any]:
    torch.manual_seed(0)
    large, small = torch.randn(64, channels, 3, 3), torch.randn(7)
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


@pytest.mark.parametrize("average", [0.75, 1.0])
@pytest.mark.parametrize(
    ("make", "memory_format"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3), None),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.channels_last),
        (functools.partial(torch.optim.SGD, lr=0.1), None),
        (functools.partial(torch.optim.AdamW, lr=0.1), None),
    ],
)
def test_the_step_is_the_same(make: Any, memory_format: Any, average: float) -> None:
    relaxation = le.entropy_sgd(4, 0.5, 0.0, average)
    ours, theirs = (train(make, relaxation, compile, memory_format) for compile in (False, True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def small_step(compile: bool, gradients: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(torch.ones_like(g)) for g in gradients]
    optimizer = torch.optim.SGD(params, momentum=0.9, **options)
    le.relax(optimizer, le.entropy_sgd(5, 0.5, 0.0, 0.75), compile=compile)
    for _ in range(3):  # the first is the optimizer's own, as it makes the momentum
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"maximize": True}, {"lr": torch.tensor(0.1)}])
def test_what_the_kernel_is_not_for_is_left_to_the_others(options: dict[str, Any]) -> None:
    gradients = [
        torch.randn(1),
        torch.randn(3, 5).T.contiguous().T,  # in another order than its parameter, which is made like it
        torch.randn(1025, dtype=torch.float64),
        torch.randn(4, 4).to(torch.bfloat16),
        torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38, 0.0]),
        torch.empty(0),
    ]
    ours, theirs = (small_step(compile, gradients, **{"lr": 0.1} | options) for compile in (False, True))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_gradient_in_another_order_is_the_optimizers() -> None:
    w = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, le.hamilton_jacobi(5, 1e-9), compile=True)
    gradient = torch.arange(12.0).view(3, 4)
    w.grad = gradient.T.contiguous().T
    assert w.grad.stride() != w.stride()
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_the_noise_does_not_depend_on_the_number_of_threads() -> None:
    def draw(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            w = torch.nn.Parameter(torch.zeros(LARGE))
            v = torch.nn.Parameter(torch.zeros(5))
            optimizer = torch.optim.SGD([v, w], lr=1.0)
            le.relax(optimizer, le.entropy_sgd(5, 0.5, 1.0, 0.75), seed=0, compile=True)
            v.grad, w.grad = torch.zeros(5), torch.zeros(LARGE)
            optimizer.step()
        finally:
            torch.set_num_threads(before)
        return torch.cat([v.detach(), w.detach()])

    assert torch.equal(draw(1), draw(3))


def test_a_backward_pass_through_weights_that_have_changed_is_refused() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, le.hamilton_jacobi(5, 0.5), compile=True)
    w.grad = torch.ones(3)
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def wrong_momentum(w: torch.nn.Parameter, optimizer: torch.optim.Optimizer, loop: le.InnerOuter) -> None:
    optimizer.state[w]["momentum_buffer"] = torch.zeros(40)[:3]


def wrong_anchor(w: torch.nn.Parameter, optimizer: torch.optim.Optimizer, loop: le.InnerOuter) -> None:
    w.data = torch.ones(4000)


def wrong_gradient(w: torch.nn.Parameter, optimizer: torch.optim.Optimizer, loop: le.InnerOuter) -> None:
    w.grad = None
    w.data = torch.ones(4000)
    w.grad = torch.ones(4000)
    w.data = torch.ones(40)


@pytest.mark.parametrize("spoil", [wrong_momentum, wrong_anchor, wrong_gradient])
def test_another_shape_is_torchs_error_and_no_write_beyond_the_end(spoil: Any) -> None:
    w = torch.nn.Parameter(torch.ones(40))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    loop = le.relax(optimizer, le.entropy_sgd(9, 0.5, 0.0, 0.75), compile=True)
    w.grad = torch.ones(40)
    optimizer.step()
    spoil(w, optimizer, loop)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


class Wrapped(torch.Tensor):
    """A parameter of a class of its own, which may keep its numbers elsewhere."""


def odd_gradients(w: torch.Tensor) -> list[torch.Tensor]:
    return [torch._efficientzerotensor(w.shape), torch._neg_view(torch.ones_like(w)), torch.ones(1).expand(w.shape)]


def test_tensors_without_plain_numbers_are_left_to_torch() -> None:
    def run(compile: bool) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
        params.append(torch.nn.Parameter(torch.ones(5).as_subclass(Wrapped)))
        optimizer = torch.optim.SGD(params, lr=0.5, weight_decay=0.1)
        le.relax(optimizer, le.hamilton_jacobi(9, 0.5), compile=compile)
        for p, g in zip(params, [*odd_gradients(params[0]), torch.ones(5)], strict=True):
            p.grad = g
        optimizer.step()
        return [p.detach().as_subclass(torch.Tensor) for p in params]

    torch.testing.assert_close(run(True), run(False))


def test_a_momentum_in_another_order_at_the_same_place_is_seen() -> None:
    w = torch.nn.Parameter(torch.randn(8, 6, 3, 3))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    le.relax(optimizer, le.entropy_sgd(99, 1e-9, 0.0, 0.75), compile=True)
    for _ in range(2):
        w.grad = torch.randn_like(w)
        optimizer.step()
    momentum = optimizer.state[w]["momentum_buffer"]
    momentum.as_strided_(w.shape, torch.empty_like(w, memory_format=torch.channels_last).stride())
    w.grad = torch.randn_like(w)
    expected = w.detach() - 0.1 * (0.9 * momentum + w.grad)
    optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=1e-6)


def halve(w: torch.nn.Parameter) -> None:
    assert w.grad is not None
    w.grad.mul_(0.5)


def test_other_step_hooks_see_and_change_the_gradient() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, le.hamilton_jacobi(9, 1e-9), compile=True)
    optimizer.register_step_pre_hook(lambda *_: halve(w))
    w.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.5))


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


def test_an_update_that_raises_leaves_no_old_gradient() -> None:
    params = [torch.nn.Parameter(torch.randn(LARGE)), torch.nn.Parameter(torch.randn(7))]
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


@pytest.mark.parametrize("make", [functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_a_resumed_loop_draws_what_was_left(make: Any) -> None:
    def start() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, le.InnerOuter]:
        w = torch.nn.Parameter(torch.zeros(LARGE))
        optimizer = make([w])
        return w, optimizer, le.relax(optimizer, le.entropy_sgd(5, 0.5, 1e-2, 0.75), seed=0, compile=True)

    def go(w: torch.Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            w.grad = torch.full_like(w, float(i))
            optimizer.step()

    w, optimizer, loop = start()
    go(w, optimizer, range(8))
    saved = copy.deepcopy((optimizer.state_dict(), loop.state_dict()))
    go(w, optimizer, range(8, 17))
    again, again_optimizer, again_loop = start()
    again_optimizer.load_state_dict(saved[0])
    again_loop.load_state_dict(saved[1])
    go(again, again_optimizer, range(8, 17))
    assert torch.equal(w, again)
    assert w.std() > 1e-5


def test_heat_perturbs_by_the_kernels_noise() -> None:
    w = torch.nn.Parameter(torch.ones(LARGE))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.heat(2, 16.0), seed=0, compile=True)
    loop.begin()
    draws = []
    for gradient in (1.0, 3.0):
        draws.append((w.detach() - 1) / 0.25)
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    assert all(stats.kstest(n.numpy(), "norm").pvalue > 1e-3 for n in draws)
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 5 / LARGE**0.5
    assert (loop.anchor[0] == -1).all()  # one step along the mean gradient 2


@pytest.mark.parametrize("make", [functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("scale", ["absolute", "filter"])
def test_a_chain_on_the_smoothed_loss(make: Any, scale: Any) -> None:
    """f = |y|^2 / 2, so that the gradient is where it is taken: each step by hand, with the kernel's own draws.

    A perturbation by filters, whose size is a tensor, is torch's.
    """
    gamma, width, average, inner_steps = 0.5, 0.1, 0.75, 3
    relaxation = le.Relaxation(inner_steps=inner_steps, gamma=gamma, width=width, average=average, scale=scale)
    w, v = torch.nn.Parameter(torch.randn(64, 33)), torch.nn.Parameter(torch.randn(64, 33))
    v.data.copy_(w)
    optimizer, inner = make([w]), make([v])
    loop = le.relax(optimizer, relaxation, seed=3, compile=True)
    loop.prepare()
    streams, kernel = NoiseStreams(3, "perturbation"), step.NativeStep([v])
    x, z = v.detach().clone(), v.detach().clone()
    for i in range(8):
        w.grad = w.detach().clone()
        optimizer.step()
        noise = torch.zeros_like(x)
        move = Move([noise], [torch.zeros_like(x)], None, [0.0], [1.0], seeds=streams.seeds([v], [v], i))
        (kernel.move_ if scale == "absolute" else inner_move_)(move)
        norms = 1.0 if scale == "absolute" else v.detach().norm(dim=1, keepdim=True)
        v.grad = v.detach() + width * norms * noise
        inner.step()
        k = inner.param_groups[0]["lr"] * gamma
        v.data.copy_((v.data + k * x) / (1 + k))
        z += average * (v.detach() - z)
        if (i + 1) % inner_steps == 0:
            x.copy_(z)
            v.data.copy_(z)
        loop.unperturb()
        torch.testing.assert_close(w.detach(), v.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loop.anchor[0], x, rtol=1e-4, atol=1e-5)
        loop.prepare()


def test_a_write_into_weights_that_the_kernel_perturbed_is_seen() -> None:
    w = torch.nn.Parameter(torch.randn(LARGE))
    optimizer = torch.optim.SGD([w], lr=0.1)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=3, gamma=0.5, width=0.1), seed=3, compile=True)
    y = w.detach().clone()
    loop.prepare()
    with torch.no_grad():
        w.mul_(1)
    loop.unperturb()
    assert torch.equal(w, y)
    loop.prepare()
    with torch.no_grad():
        w[0] += 1
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"):
        loop.unperturb()
    assert torch.equal(w, y)


def test_where_it_can_do_nothing_it_says_so() -> None:
    with pytest.warns(UserWarning, match="compile=True does nothing for parameters on meta: its kernels are"):
        step.NativeStep([torch.nn.Parameter(torch.empty(3, device="meta"))])


def test_a_loop_with_a_kernel_can_be_copied() -> None:
    kernel = step.NativeStep([torch.nn.Parameter(torch.ones(3))])
    for again in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        y = torch.ones(1)
        again.move_(Move([y], [torch.zeros(1)], None, [1.0], [0.0]))
        assert y.item() == 0.5
