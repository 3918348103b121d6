"""Test error at equal gradients: ResNet-18 without augmentation, every method at the same rate and weight decay."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lightning_entropy as le
from benchmarks.gpu.record import Piece, Row
from recipes.classifier import Batch
from recipes.compare.measure import calibration_error, error_and_loss, reestimated
from recipes.data.sources import read, read_folder
from recipes.resnet import ResNet18

BATCH, LR = 128, 0.1
METHODS: dict[str, le.Relaxation | None] = {
    "SGD": None,
    "EMA": None,
    "SAM in the last eighth": None,
    "HeatSmoothing(width=0.1, scale='relative')": le.heat(width=0.1, scale="relative"),
    "smoothed_lookahead(width=0.1)": le.smoothed_lookahead(width=0.1),
}


def images(folder: Path | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels and test images and labels, normalised, on the device."""
    found = read("random", root="") if folder is None else read_folder(str(folder))
    x = found.images.to(device).float() / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    x, y, n = x.contiguous(memory_format=torch.channels_last), found.labels.to(device), found.n_train
    return x[:n], y[:n], x[n:], y[n:]


def train(
    name: str, folder: Path | None, device: torch.device, *, seed: int, weight_decay: float, epochs: int, width: int
) -> list[Row]:
    """Train by a method and return what the test images say."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = images(folder, device)
    net = ResNet18(width).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    total = epochs * (len(x) // BATCH)  # gradients
    warm = max(1, total // 20)

    def rate(step: int) -> float:
        return min(step / warm, max(0.0, (total - step) / (total - warm)))

    schedule = LambdaLR(optimizer, lambda step: max(rate(step), 1e-3))
    relaxation = METHODS[name]
    loop = None if relaxation is None else le.relax(optimizer, relaxation, seed=seed)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=False) if name == "EMA" else None

    def gradient(rows: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        return loss.detach()

    taken, late, loss = 0, name.startswith("SAM"), torch.tensor(float("nan"))
    while taken < total:
        for rows in torch.randperm(len(x), device=device).split(BATCH):
            if len(rows) < BATCH or taken >= total:
                break
            if loop is not None:
                loop.prepare()
            loss = gradient(rows)
            if late and taken >= 0.875 * total:  # a second gradient, of the same batch, where the loss is higher
                grads = [p.grad for p in net.parameters() if p.grad is not None]
                scale = 0.1 / torch.stack([g.norm() for g in grads]).norm()
                away = [g * scale for g in grads]
                params = [p.data for p in net.parameters() if p.grad is not None]
                torch._foreach_add_(params, away)
                gradient(rows)
                torch._foreach_sub_(params, away)
                schedule.step()
                taken += 1
            optimizer.step()
            schedule.step()
            taken += 1
            if average is not None:
                average.update_parameters(net)
    some, test = pairs(x, y)[:50], pairs(x_test, y_test)
    words = "made-up images" if folder is None else folder.name
    row: Row = {
        "table": f"accuracy, {words}: ResNet-18 of width {width}, {epochs} epochs",
        "method": name,
        "weight decay": weight_decay,
        "seed": seed,
        "last training loss": float(loss),
    }
    if loop is None:
        return [row | judged(net if average is None else average.module, some, test)]
    loop.close()
    with loop.at_anchor():
        return [row | judged(net, some, test)]


def pairs(x: Tensor, y: Tensor) -> list[Batch]:
    """Return batches of images and labels."""
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def judged(net: nn.Module, train: list[Batch], test: list[Batch]) -> Row:
    """Return what the test images say, with BatchNorm's statistics re-estimated for all methods alike."""
    with reestimated(net, train):
        error, loss = error_and_loss(net, test)
        return {"test error %": error, "test loss": loss, "calibration error": calibration_error(net, test, 10)}


def pieces(device: torch.device, small: bool, folder: Path | None) -> list[Piece]:
    """Return the pieces: first every method with seed 0, at a usual weight decay and at ten times that."""
    words = "made-up images" if folder is None else folder.name
    found = []
    for seed in (0,) if small else (0, 1, 2):
        for weight_decay in (5e-4,) if small else (5e-4, 5e-3):
            for name in METHODS:
                work = partial(
                    train,
                    name,
                    folder,
                    device,
                    seed=seed,
                    weight_decay=weight_decay,
                    epochs=1 if small else 60,
                    width=2 if small else 64,
                )
                title = f"accuracy, {words}, {name}, weight decay {weight_decay:g}, seed {seed}"
                found.append(Piece(title, 10 if small else 480, work))
    return found
