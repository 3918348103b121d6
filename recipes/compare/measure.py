"""How weights are judged: error and loss with running or re-estimated statistics, and under noise on the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError
from torchvision.transforms.v2.functional import gaussian_blur

from recipes.classifier import Batch, tracking


@torch.no_grad()
def error_and_loss(net: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Return the error in per cent and the mean cross entropy of a net in evaluation mode.

    Args:
        net: maps images to logits; its mode is left as it was.
        batches: pairs of images [n, channels, height, width] and labels [n].
    """
    with _evaluating(net):
        wrong, loss, n = 0, 0.0, 0
        for images, labels in batches:
            logits = net(images).float()
            wrong += (logits.argmax(1) != labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            n += len(labels)
    return 100 * float(wrong) / n, float(loss) / n


@contextmanager
def reestimated(net: nn.Module, batches: Iterable[Batch]) -> Iterator[None]:
    """Set BatchNorm's statistics to their mean over ``batches`` inside the context, and restore them after it.

    Every layer's mean and variance are averaged over the batches with equal weight, dropout switched off.

    Args:
        net: in evaluation mode inside the context.
        batches: of training images, which ought to be mixed and of equal size.

    Example:
        >>> net = nn.BatchNorm1d(1)
        >>> with reestimated(net, [(torch.tensor([[1.0], [3.0]]), None), (torch.tensor([[5.0], [7.0]]), None)]):
        ...     net.running_mean.item(), net.running_var.item()
        (4.0, 2.0)
        >>> net.running_mean.item(), net.training
        (0.0, True)
    """
    layers = tracking(net)
    saved = [(layer.momentum, [buffer.clone() for buffer in layer.buffers()]) for layer in layers]
    try:
        with _evaluating(net):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a mean over all batches
                layer.train()
            with torch.no_grad():
                for images, _ in batches if layers else ():
                    net(images)
            for layer in layers:
                layer.eval()
            yield
    finally:
        for layer, (momentum, buffers) in zip(layers, saved, strict=True):
            layer.momentum = momentum
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)


@torch.no_grad()
def loss_rise(net: nn.Module, batches: Iterable[Batch], ratio: float = 0.1, draws: int = 5, seed: int = 0) -> float:
    """Return how much the loss rises on average when Gaussian noise is added to the weights.

    The noise on each output filter (on each vector as a whole) has ``ratio`` times the filter's norm, in the mean
    square: a measure that does not change when BatchNorm makes a filter's scale meaningless.

    Args:
        net: judged in evaluation mode, with the statistics it has; its weights are put back.
        batches: kept in memory, as every draw sees all of them.
        ratio: norm of the noise over norm of the filter, >= 0.
        draws: of the noise, >= 1.
        seed: of the noise, the same for every net.
    """
    batches = list(batches)
    params = list(net.parameters())
    saved = [p.clone() for p in params]
    generator = torch.Generator().manual_seed(seed)
    clean = error_and_loss(net, batches)[1]
    rises = []
    try:
        for _ in range(draws):
            for p, value in zip(params, saved, strict=True):
                filters = value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(1, -1)
                noise = torch.randn(filters.shape, generator=generator).to(filters)
                scale = filters.norm(dim=1, keepdim=True) / filters.shape[1] ** 0.5
                p.copy_((filters + ratio * scale * noise).view_as(p))
            rises.append(error_and_loss(net, batches)[1] - clean)
    finally:
        for p, value in zip(params, saved, strict=True):
            p.copy_(value)
    return sum(rises) / draws


@torch.no_grad()
def calibration_error(net: nn.Module, batches: Iterable[Batch], classes: int) -> float:
    """Return by how much the net's confidence differs from its accuracy, in the mean over 15 bins of confidence.

    References:
        Guo, Pleiss, Sun and Weinberger, On calibration of modern neural networks, ICML 2017, arXiv:1706.04599.
    """
    metric = MulticlassCalibrationError(classes, n_bins=15, norm="l1")
    with _evaluating(net):
        for images, labels in batches:
            metric.update(net(images).float().softmax(1).cpu(), labels.cpu())
    return float(metric.compute())


def corrupted(batches: Iterable[Batch], seed: int = 0) -> Iterator[Batch]:
    """Blur every image by a Gaussian of one pixel, and add noise of 0.3 standard deviations of the data's pixels.

    Args:
        batches: of normalised images.
        seed: of the noise, the same for every net.
    """
    generator = torch.Generator().manual_seed(seed)
    for images, labels in batches:
        noise = torch.randn(images.shape, generator=generator).to(images)
        yield gaussian_blur(images, [5, 5], [1.0, 1.0]) + 0.3 * noise, labels


@contextmanager
def pruned(net: nn.Module, share: float = 0.6) -> Iterator[None]:
    """Set the smallest weights of every convolution and linear layer to zero inside the context.

    Args:
        net: its weights are put back.
        share: of a layer's weights, in [0, 1].
    """
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    saved = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:  # torch's own pruning refuses weights in channels_last
                flat = weight.flatten().clone()
                flat[flat.abs().topk(round(share * len(flat)), largest=False).indices] = 0
                weight.copy_(flat.view(weight.shape))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
