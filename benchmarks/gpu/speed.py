"""Images and tokens per second of whole training steps, and the share of the device's bfloat16 rate that they reach."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lightning_entropy as le
from benchmarks.gpu.record import Piece, Row
from benchmarks.gpu.timing import in_turns, matmul_rate
from recipes.allcnn import AllCNN
from recipes.lm.gpt import GPT
from recipes.resnet import ResNet18
from recipes.wide_resnet import WideResNet

METHODS: dict[str, le.Relaxation | None] = {
    "plain": None,
    "EntropySGD()": le.entropy_sgd(),
    "HeatSmoothing(width=0.1, scale='relative')": le.heat(width=0.1, scale="relative"),
    "smoothed_lookahead()": le.smoothed_lookahead(),
}


def training(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], relaxation: le.Relaxation | None
) -> Callable[[], None]:
    """Return a training step in bfloat16, forward to update."""
    device = batch[0].device
    loop = None if relaxation is None else le.relax(optimizer, relaxation, seed=0)

    def step() -> None:
        if loop is not None:
            loop.prepare()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(batch[0])
            loss = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        loss.backward()
        optimizer.step()

    return step


def operations(step: Callable[[], None]) -> int:
    """Return the floating-point operations of matrix products and convolutions in a step."""
    with FlopCounterMode(display=False) as counted:
        step()
    return int(counted.get_total_flops())


def measure(
    make: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, Tensor]],
    unit: str,
    device: torch.device,
    **how: Any,
) -> list[Row]:
    """Return a row for every method.

    Args:
        make: the net.
        data: a batch.
        unit: ``"images"`` or ``"tokens"``.
        device: that trains.
        **how: ``optimizer`` makes it; ``compile`` the net; ``rounds`` and ``repeats`` of the times, ``size`` of the
            matrices whose product is the measure.
    """
    rate = matmul_rate(device, how["size"])
    batch = data()
    count = batch[1].numel()
    steps = {}
    for name, relaxation in METHODS.items():
        net = make().to(device)
        if unit == "images":
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = how["optimizer"](net.parameters())
        if name == "plain":
            work = operations(training(net, optimizer, batch, None))
        called = torch.compile(net) if how["compile"] else net
        steps[name] = training(called, optimizer, batch, relaxation)
    rows = []
    for name, times in in_turns(steps, device, how["rounds"], how["repeats"]).items():
        rows.append(
            {
                "method": name,
                f"{unit}/s": count / times.seconds,
                "ratio of the time": times.ratio,
                "quartiles": [times.ratio_low, times.ratio_high],
                "share of the bf16 rate": work / times.seconds / rate,
            }
        )
    return rows


def pieces(device: torch.device, small: bool) -> list[Piece]:
    """Return the pieces."""
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    common: dict[str, Any] = {"device": device, "rounds": 9, "repeats": 10, "size": 8192, "compile": False}
    nets: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "WRN-28-10": (WideResNet, 128),
        "All-CNN-BN": (AllCNN, 128),
        "ResNet-18": (ResNet18, 128),
    }
    gpts: dict[str, tuple[dict[str, Any], int]] = {
        "GPT 124M": ({"vocab_size": 50304, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}, 16)
    }
    if small:
        common |= {"rounds": 3, "repeats": 2, "size": 256}
        nets = {"ResNet-18 of width 4": (partial(ResNet18, 4), 4)}
        gpts = {"a GPT": ({"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}, 2)}

    def images(batch: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(10, (batch,), device=device)

    def tokens(batch: int, size: dict[str, Any]) -> tuple[Tensor, Tensor]:
        text = torch.randint(size.get("vocab_size", 256), (batch, size["block_size"] + 1), device=device)
        return text[:, :-1], text[:, 1:]

    found = []
    for compile in (False,) if small else (False, True):
        how = common | {"compile": compile}
        after = ", torch.compile" if compile else ""
        for name, (net, batch) in nets.items():
            work = partial(measure, net, partial(images, batch), "images", optimizer=sgd, **how)
            found.append(Piece(f"speed, {name}{after}", 10 if small else 90 + 90 * compile, work))
        for name, (size, batch) in gpts.items():
            work = partial(
                measure, partial(GPT, **size), partial(tokens, batch, size), "tokens", optimizer=adamw, **how
            )
            found.append(Piece(f"speed, {name}{after}", 10 if small else 90 + 90 * compile, work))
    return found
