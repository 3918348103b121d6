"""A small training: what the engine's tests share."""

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.noise import NoiseStreams
from tests.engine.methods_table import Make


class Net(torch.nn.Module):
    """Matrices alone, so that every optimizer takes it."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(4, 3, generator=g, dtype=dtype) / 2)
        self.b = torch.nn.Parameter(torch.randn(2, 4, generator=g, dtype=dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T) @ self.b.T


@functools.cache
def batch(i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + i)
    x = torch.randn(6, 3, generator=g, dtype=dtype)
    return x, x[:, :2].sin()


def loss_of(net: torch.nn.Module, i: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    x, y = batch(i, dtype)
    return (net(x) - y).square().sum()


def closure_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        return loss

    return closure


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int, how: str = "none") -> None:
    closure = closure_of(net, optimizer, i)
    if how == "positional":
        optimizer.step(closure)
    elif how == "keyword":
        optimizer.step(closure=closure)
    else:
        closure()
        optimizer.step()


def step_without_zero(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    for p in net.parameters():
        p.grad = None
    loss_of(net, i).backward()
    optimizer.step()


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(list(left), list(right), rtol=0, atol=0, equal_nan=True)


def start(
    make: Make, relaxation: le.Relaxation, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Net, torch.optim.Optimizer, le.InnerOuter]:
    net = Net(seed, dtype)
    optimizer = make(net.parameters())
    loop = le.relax(optimizer, relaxation, **{"seed": 3, **options})
    loop.begin()
    return net, optimizer, loop


def two_replicas(tensors: list[Tensor]) -> Any:
    """A second replica that always stands at zero; waited for."""
    return lambda: [t / 2 for t in tensors]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws(params: Any, number: int, seed: int = 3, purpose: str = "") -> list[Tensor]:
    """The N(0, 1) numbers that a loop of this seed adds to its parameters in step ``number``, in the anchor's type."""
    params = list(params)
    seeds = NoiseStreams(seed, purpose).seeds(params, params, number)
    noise = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    zeros, off, on = [torch.zeros_like(n) for n in noise], [0.0] * len(noise), [1.0] * len(noise)
    F.inner_move_(F.Move(noise, zeros, None, stiffness=off, noise=on, seeds=seeds))
    return noise


def perturbations(params: Any, number: int, seed: int = 3) -> list[Tensor]:
    """The N(0, 1) numbers at which a chain of this seed takes its gradients in step ``number``."""
    return draws(params, number, seed, "perturbation")
