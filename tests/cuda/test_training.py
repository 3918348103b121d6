"""Mixed precision, fused and capturable optimizers, compiled and channels-last nets, and resumes, on a device."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_entropy as le

METHODS = {
    "entropy_sgd": le.entropy_sgd(3, 1.0, 1e-2),
    "lookahead": le.lookahead(3),
    "heat": le.heat(width=0.1, scale="relative"),
    "smoothed_lookahead": le.smoothed_lookahead(3, width=0.1),
    "diloco": le.diloco(3),
}


def net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return layers.to(device)


def batch(i: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, 8, 8, generator=g).to(device), torch.randint(4, (4,), generator=g).to(device)


def sgd(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, **options)


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loop: Any,
    steps: range,
    device: torch.device,
    *,
    called: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    for i in steps:
        x, target = batch(i, device)
        loop.prepare()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy((called or module)(x), target)
        loss.backward()
        optimizer.step()


def weights(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in module.state_dict().values()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resume_in_the_middle_of_a_loop_is_exact(
    method: str, dtype: torch.dtype | None, device: torch.device
) -> None:
    module = net(device)
    optimizer = sgd(module)
    loop = le.relax(optimizer, METHODS[method], seed=1)
    train(module, optimizer, loop, range(5), device, dtype=dtype)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), loop.state_dict()))
    train(module, optimizer, loop, range(5, 10), device, dtype=dtype)
    again = net(device)
    other = sgd(again)
    second = le.relax(other, METHODS[method], seed=2)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(again, other, second, range(5, 10), device, dtype=dtype)
    for got, expected in zip(weights(again), weights(module), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_the_gradient_scaler_skips_is_none(method: str, fused: bool, device: torch.device) -> None:
    """With an inf in the gradients of one batch, the training is that without this batch."""

    def run(batches: list[int], bad: int) -> tuple[list[Tensor], int]:
        module = net(device)
        optimizer = sgd(module, fused=fused)
        loop = le.relax(optimizer, METHODS[method], seed=1)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000, backoff_factor=0.5)
        for i in batches:
            x, target = batch(i, device)
            loop.prepare()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16):
                loss = F.cross_entropy(module.eval()(x), target)
            scaler.scale(loss).backward()
            if i == bad:
                for p in module.parameters():
                    assert p.grad is not None
                    p.grad[(0,) * p.grad.ndim] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return weights(module), loop.outer_step * METHODS[method].inner_steps + loop.inner_step

    got, count = run([0, 1, 2, 3, 4, 5], bad=3)
    expected, expected_count = run([0, 1, 2, 4, 5], bad=-1)
    assert count == expected_count
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}], ids=["fused", "capturable"])
@pytest.mark.parametrize("method", METHODS)
def test_fused_and_capturable_optimizers_take_the_same_steps(
    method: str, options: dict[str, Any], device: torch.device
) -> None:
    if "capturable" in options and device.type == "cpu":
        pytest.skip("torch has capturable optimizers on GPUs alone")

    def run(**how: Any) -> list[Tensor]:
        module = net(device)
        rate = torch.tensor(0.01, device=device) if "capturable" in how else 0.01
        optimizer = torch.optim.AdamW(module.parameters(), rate, **how)
        train(module, optimizer, le.relax(optimizer, METHODS[method], seed=1), range(9), device)
        return weights(module)

    for a, b in zip(run(**options), run(foreach=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# A chain's noise on the CPU is drawn in the order of memory, which is another one here.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "entropy_sgd"])
def test_a_channels_last_net_takes_the_same_steps(method: str, device: torch.device) -> None:
    def run(format: torch.memory_format) -> list[Tensor]:
        module: nn.Module = net(device).to(memory_format=format)  # type: ignore[call-overload]
        optimizer = sgd(module)
        train(module, optimizer, le.relax(optimizer, METHODS[method], seed=1), range(9), device)
        return weights(module)

    for a, b in zip(run(torch.channels_last), run(torch.contiguous_format), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["entropy_sgd", "heat"])
def test_a_compiled_net_takes_the_same_steps(method: str, device: torch.device) -> None:
    def run(compile: bool) -> list[Tensor]:
        module = net(device)
        optimizer = sgd(module)
        loop = le.relax(optimizer, METHODS[method], seed=1)
        called = torch.compile(module) if compile else None
        train(module, optimizer, loop, range(9), device, called=called)
        return weights(module)

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_graphed_net_takes_the_same_steps(method: str) -> None:
    device = torch.device("cuda")

    def run(graphed: bool) -> list[Tensor]:
        module = net(device).eval()  # no statistics that warming up would change
        optimizer = sgd(module)
        loop = le.relax(optimizer, METHODS[method], seed=1)
        sample = batch(0, device)[0]
        called: Any = torch.cuda.make_graphed_callables(copy.copy(module), (sample,)) if graphed else None
        train(module, optimizer, loop, range(9), device, called=called)
        return weights(module)

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_a_step_is_refused_in_a_capture() -> None:
    module = net(torch.device("cuda"))
    optimizer = sgd(module)
    loop = le.relax(optimizer, METHODS["lookahead"])
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must not be captured"), torch.cuda.graph(graph):
        optimizer.step()
    loop.detach()
