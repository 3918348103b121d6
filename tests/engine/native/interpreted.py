"""The Triton kernel in Triton's interpreter, on the CPU. test_cuda.py runs this file with TRITON_INTERPRET=1."""

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.arithmetic import Move, inner_move_
from lightning_entropy.engine.gaussian import Place
from lightning_entropy.engine.native import cuda, step
from lightning_entropy.engine.native.cuda import BLOCK, TritonKernel
from lightning_entropy.engine.noise import NoiseStreams
from tests.device_calls import as_on_a_gpu
from tests.engine.native.philox import SIZE, WEIGHTS, normal, philox
from tests.engine.native.test_step import odd_gradients, small_step, train

NUMPYS = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
SIZES = [(1,), (5,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, 5, 7, 11), (2 * BLOCK + 513,), (0,)]


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parameters on the CPU take what those on CUDA do."""
    monkeypatch.setattr(step, "KERNELS", {"cpu": TritonKernel})
    with as_on_a_gpu():
        yield


def tensors(*, seed: int, shift: int = 0) -> list[Tensor]:
    """Of all sizes, one in the order of channels_last, beginning ``shift`` numbers after a multiple of 64 bytes."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(math.prod(s) + shift, generator=generator)[shift:].view(s) for s in SIZES]
    found[5] = found[5].to(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("mean", [True, False])
def test_pull_and_mean(mean: bool, shift: int) -> None:
    y, x, z = (tensors(seed=i, shift=shift) for i in range(3))
    expected_y, expected_z = copy.deepcopy(y), copy.deepcopy(z)
    k = [0.5 + i for i in range(len(SIZES))]
    step.NativeStep(y).move_(Move(y, x, z if mean else None, k, [0.0] * len(k), 0.75))
    inner_move_(Move(expected_y, x, expected_z if mean else None, k, [0.0] * len(k), 0.75))
    torch.testing.assert_close(y, expected_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z, expected_z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("average", [0.75, 1.0])
@pytest.mark.parametrize(
    ("make", "memory_format"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3), None),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.channels_last),
        (functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), None),
        (functools.partial(torch.optim.AdamW, lr=0.1), None),
    ],
)
def test_the_whole_step_with_an_optimizer(make: Any, memory_format: Any, average: float) -> None:
    relaxation = le.entropy_sgd(4, 0.5, 0.0, average)
    ours, theirs = (train(make, relaxation, compile, memory_format, channels=5) for compile in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@NUMPYS
@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"maximize": True}, {"lr": torch.tensor(0.1)}])
def test_what_the_kernel_is_not_for_is_left_to_the_others(options: dict[str, Any]) -> None:
    gradients = [
        torch.randn(1),
        torch.randn(3, 5).T.contiguous().T,
        torch.randn(1025, dtype=torch.float64),
        torch.randn(4, 4).to(torch.bfloat16),
        torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38, 0.0]),
        torch.empty(0),
    ]
    ours, theirs = (small_step(compile, gradients, **{"lr": 0.1} | options) for compile in (False, True))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_tensors_without_plain_numbers_are_left_to_torch() -> None:
    def run(compile: bool) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
        optimizer = torch.optim.SGD(params, lr=0.5, weight_decay=0.1)
        le.relax(optimizer, le.hamilton_jacobi(9, 0.5), compile=compile)
        for p, g in zip(params, odd_gradients(params[0]), strict=True):
            p.grad = g
        optimizer.step()
        return [p.detach() for p in params]

    torch.testing.assert_close(run(True), run(False))


def noise_of(sizes: list[int], seed: int, *, moving: list[int] | None = None, number: int = 0) -> list[Tensor]:
    """What the kernel adds to parameters of these sizes, of which some move."""
    params = [torch.zeros(size) for size in sizes]
    some = [params[i] for i in (range(len(sizes)) if moving is None else moving)]
    seeds = NoiseStreams(seed).seeds(some, params, number)
    assert all(isinstance(s, Place) for s in seeds)
    zeros = [torch.zeros_like(p) for p in some]
    step.NativeStep(some).move_(Move(some, zeros, None, [0.0] * len(some), [1.0] * len(some), seeds=seeds))
    return some


def test_the_noise_to_the_number() -> None:
    """Against the generator's definition, whose first answer for zeros is its authors'."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    _, found = noise_of([7, SIZE], 3)
    params = [torch.zeros(7), torch.zeros(SIZE)]
    _, place = NoiseStreams(3).seeds(params, params, 0)
    assert isinstance(place, Place) and place.start == 7
    for i in WEIGHTS:
        assert found[i].item() == pytest.approx(normal(place, i), rel=1e-5, abs=1e-6)


def test_the_noise_is_normal() -> None:
    n = noise_of([1 << 18], 12345)[0]
    assert stats.kstest(n.numpy(), "norm").pvalue > 1e-3
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert n.double().pow(power).mean().item() == pytest.approx(mean, abs=4 * (variance / len(n)) ** 0.5)
    quarters = n.view(-1, 4, BLOCK // 4).transpose(0, 1).flatten(1).double()
    limit = 5 / quarters.shape[1] ** 0.5
    for one in (quarters, quarters.abs(), quarters.square()):
        assert (torch.corrcoef(one) - torch.eye(4)).abs().max() < limit
    for lag in (1, 2, 512, BLOCK):
        assert (n[lag:] * n[:-lag]).mean().abs() < 5 / len(n) ** 0.5


def test_the_noise_is_of_the_seed_the_step_and_the_weight_alone() -> None:
    sizes = [300, BLOCK + 9, 300]
    all_of_them = noise_of(sizes, 3)
    assert torch.equal(noise_of(sizes, 3, moving=[1])[0], all_of_them[1])
    assert torch.equal(noise_of(sizes, 3, moving=[2, 0])[0], all_of_them[2])
    others = [all_of_them[0], all_of_them[2], noise_of(sizes, 4)[0], noise_of(sizes, 3, number=1)[0]]
    assert torch.corrcoef(torch.stack(others)).fill_diagonal_(0).abs().max() < 5 / 300**0.5


def test_blocks_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [300, 3 * BLOCK + 9, 0, 17]
    expected = noise_of(sizes, 3)
    laid_out = TritonKernel._blocks_of
    monkeypatch.setattr(TritonKernel, "_blocks_of", lambda *given: laid_out(*given).flip(0))
    assert all(map(torch.equal, noise_of(sizes, 3), expected))


@pytest.mark.parametrize("make", [functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_a_resumed_loop_draws_what_was_left(make: Any) -> None:
    def start() -> tuple[Tensor, torch.optim.Optimizer, le.InnerOuter]:
        w = torch.nn.Parameter(torch.zeros(2 * BLOCK + 5))
        optimizer = make([w])
        return w, optimizer, le.relax(optimizer, le.entropy_sgd(5, 0.5, 1e-2, 0.75), seed=0, compile=True)

    def go(w: Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
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
    w = torch.nn.Parameter(torch.ones(8 * BLOCK))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.heat(2, 16.0), seed=0, compile=True)
    loop.begin()
    draws = []
    for gradient in (1.0, 3.0):
        draws.append((w.detach() - 1) / 0.25)
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    assert all(stats.kstest(n.numpy(), "norm").pvalue > 1e-3 for n in draws)
    assert (loop.anchor[0] == -1).all()  # one step along the mean gradient 2


def test_what_does_not_change_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    plain = cuda._sent
    monkeypatch.setattr(cuda, "_sent", lambda values, device: sent.append(values.dtype) or plain(values, device))
    y, x = tensors(seed=0), tensors(seed=1)
    kernel, zeros = step.NativeStep(y), [0.0] * len(y)
    sent.clear()
    for k in (1.0, 1.0, 0.5):  # the rows hold the pull
        kernel.move_(Move(y, x, None, [k] * len(y), zeros))
    assert sent == [torch.int64, torch.int32, torch.int64]
