"""compile=True on a device: the step without it, its noise, and no wait for the device."""

import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.arithmetic import Move
from lightning_entropy.engine.gaussian import Place
from lightning_entropy.engine.native.step import NativeStep
from lightning_entropy.engine.noise import NoiseStreams
from tests.engine.native.philox import SIZE, WEIGHTS, normal

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"),
]
SHAPES = [(1 << 20,), (64, 3, 7, 7), (5,), (1,), (SIZE,)]


def parameters(device: torch.device, *, channels_last: bool = False) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    if channels_last:
        found[1] = found[1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(t) for t in found]


def give_gradients(params: list[torch.nn.Parameter], step: int, *, bucket: bool = False) -> None:
    """New ones, or views of a bucket, which begin anywhere."""
    generator = torch.Generator().manual_seed(100 + step)
    line = torch.randn(sum(p.numel() for p in params) + 1, generator=generator).to(params[0].device)[1:]
    for p, g in zip(params, line.split([p.numel() for p in params]), strict=True):
        p.grad = g.view(p.shape) if bucket else torch.empty_like(p).copy_(g.view(p.shape))


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize(
    ("make", "channels_last"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3), False),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), True),
        (functools.partial(torch.optim.SGD, lr=0.1), False),
        (functools.partial(torch.optim.AdamW, lr=0.1, fused=True), False),
    ],
)
def test_the_step_is_the_same(make: Any, channels_last: bool, bucket: bool, device: torch.device) -> None:
    def run(compile: bool) -> list[Tensor]:
        params = parameters(device, channels_last=channels_last)
        optimizer = make(params)
        loop = le.relax(optimizer, le.entropy_sgd(4, 0.5, 0.0, 0.75), seed=3, compile=compile)
        for i in range(9):
            give_gradients(params, i, bucket=bucket)
            optimizer.step()
        return [*(p.detach() for p in params), *loop.average, *loop.anchor]

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)


def test_the_noise_is_normal_and_the_same_again(device: torch.device) -> None:
    params = [torch.zeros(7, device=device), torch.zeros(SIZE, device=device), torch.zeros(1 << 20, device=device)]
    seeds, still = NoiseStreams(3).seeds(params, params, 0), [torch.zeros_like(p) for p in params]
    move = Move(params, still, None, [0.0] * 3, [1.0] * 3, seeds=seeds)
    NativeStep(params).move_(move)
    n = params[2].double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert n.pow(power).mean().item() == pytest.approx(mean, abs=4 * (variance / len(n)) ** 0.5)
    first = [p.clone() for p in params]
    for p in params:
        p.zero_()
    NativeStep(params).move_(move)
    assert all(map(torch.equal, params, first))
    if device.type == "cuda":
        place = seeds[1]
        assert isinstance(place, Place)
        for i in WEIGHTS:
            assert first[1][i].item() == pytest.approx(normal(place, i), rel=1e-4, abs=1e-5)


def test_a_step_does_not_wait_for_the_device(device: torch.device) -> None:
    params = parameters(device)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    le.relax(optimizer, le.entropy_sgd(4, 0.5, 1e-2, 0.75), seed=3, compile=True)
    for i in range(9):
        give_gradients(params, i)
        if device.type == "cuda" and i > 1:  # the kernel for gradients that begin anywhere may be compiled before
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
