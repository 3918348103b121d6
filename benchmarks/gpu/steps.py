"""What a step of the optimizer costs beside those that people use, without forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lightning_entropy as le
from benchmarks.gpu.record import Piece, Row
from benchmarks.gpu.timing import copy_rate, in_turns
from benchmarks.update import resnet50
from recipes.lm.gpt import GPT

PERIOD = 20  # inner steps: whole outer steps


def gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of the weights of a GPT of GPT-2 small's size."""
    with torch.device("meta"):
        net = GPT(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    return [tuple(p.shape) for p in net.parameters()]


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    """Return parameters with gradients."""
    found = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in found:
        p.grad = 1e-3 * torch.randn_like(p)
    return found


def contenders(kind: str, device: torch.device) -> dict[str, Callable[[list[torch.nn.Parameter]], Callable[[], Any]]]:
    """Return functions that make a step of given parameters, by name; the first is the unit.

    Args:
        kind: of the optimizer, ``"sgd"`` or ``"adamw"``.
        device: of the parameters.
    """
    make: Callable[..., torch.optim.Optimizer] = {
        "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
        "adamw": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    }[kind]

    def plain(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
        return make(params).step

    def ema(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
        model, optimizer = torch.nn.ParameterList(params), make(params)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

        def step() -> None:
            optimizer.step()
            average.update_parameters(model)

        return step

    def sam(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
        """SAM's own arithmetic, with the second gradient the first: two of its steps are two gradients."""
        optimizer = make(params)
        weights, grads = [p.data for p in params], [p.grad for p in params if p.grad is not None]

        def step() -> None:
            scale = 0.05 / torch.stack(torch._foreach_norm(grads)).norm()
            torch._foreach_mul_(grads, scale)
            torch._foreach_add_(weights, grads)
            torch._foreach_sub_(weights, grads)
            optimizer.step()

        return step

    def ours(relaxation: le.Relaxation, compile: bool = False) -> Callable[..., Callable[[], Any]]:
        def made(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
            optimizer = make(params)
            loop = le.relax(optimizer, relaxation, seed=0, compile=compile)

            def step() -> None:
                loop.prepare()
                optimizer.step()

            return step

        return made

    return {
        f"{kind}, fused": plain,
        "+ EMA, multi-tensor": ema,
        "SAM's arithmetic, per step of two gradients": sam,
        "+ Entropy-SGD without noise": ours(le.entropy_sgd(PERIOD, 0.03, 0.0)),
        "+ Entropy-SGD": ours(le.entropy_sgd(PERIOD, 0.03, 1e-4)),
        "+ Entropy-SGD without noise, compile=True": ours(le.entropy_sgd(PERIOD, 0.03, 0.0), compile=True),
        "+ Entropy-SGD, compile=True": ours(le.entropy_sgd(PERIOD, 0.03, 1e-4), compile=True),
        "+ Lookahead, k = 5": ours(le.lookahead()),
        "+ heat, relative": ours(le.heat(width=0.1, scale="relative")),
        "+ DiLoCo's outer step, every 20": ours(le.diloco(PERIOD)),
    }


def measure(kind: str, shapes: list[tuple[int, ...]], device: torch.device, rounds: int) -> list[Row]:
    """Return a row for every contender."""
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    rate = copy_rate(device, max(weights, 1 << 20))
    calls = {name: make(parameters(shapes, device)) for name, make in contenders(kind, device).items()}
    rows = []
    for name, times in in_turns(calls, device, rounds, PERIOD).items():
        rows.append(
            {
                "step": name,
                "ms": 1e3 * times.seconds,
                "ratio": times.ratio,
                "quartiles": [times.ratio_low, times.ratio_high],
                # How often all weights could have been copied in that time.
                "copies": times.seconds * rate / (8 * weights),
            }
        )
    return rows


def pieces(device: torch.device, small: bool) -> list[Piece]:
    """Return the pieces."""
    shapes = {"ResNet-50": resnet50(), "GPT-2 124M": gpt2()}
    if small:
        shapes = {"small": [(32, 3, 3, 3), (32,), (10, 32)]}
    return [
        Piece(f"step, {kind}, {name}", 5 if small else 60, partial(measure, kind, some, device, 3 if small else 15))
        for name, some in shapes.items()
        for kind in ("sgd", "adamw")
    ]
