"""Scale images: by mean and standard deviation, or by the papers' global contrast normalisation and ZCA whitening."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 2048  # images turned to float at a time while fitting


class MeanStd(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation.

    Args:
        mean: [channels], in grey levels, 0 to 255.
        std: [channels], in grey levels, > 0.
    """

    ahead = False  # cheap, and a quarter of the memory is moved if the images stay uint8 until they are drawn

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.float().view(-1, 1, 1))

    @classmethod
    def fit(cls, images: Tensor) -> MeanStd:
        """Measure mean and standard deviation of uint8 images [n, channels, height, width].

        Example:
            >>> MeanStd.fit(torch.tensor([0, 2], dtype=torch.uint8).view(2, 1, 1, 1)).std.item()
            1.0
        """
        total = squares = 0.0
        for chunk in images.split(CHUNK):
            values = chunk.double()
            total = total + values.sum((0, 2, 3))
            squares = squares + values.square().sum((0, 2, 3))
        n = images[:, 0].numel()
        mean = total / n
        return cls(mean, (squares / n - mean.square()).clamp(min=1e-12).sqrt())

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 images of mean 0 and standard deviation 1 over the images fitted to."""
        return (images.float() - self.mean) / self.std


class Whiten(nn.Module):
    """Contrast-normalise each image, then multiply by the ZCA matrix U (S + epsilon)^(-1/2) U^T of the training images.

    As the papers' preprocessing: contrast over all channels and pixels of an image (mean 0, standard deviation 1
    with n - 1), epsilon added to the covariance's singular values S.

    Args:
        mean: of the contrast-normalised training images, [d] with d = channels * height * width.
        matrix: [d, d], symmetric.
    """

    ahead = True  # d^2 products an image, nine million for CIFAR: once for all images, not at every draw

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("matrix", matrix.float())

    @classmethod
    def fit(cls, images: Tensor, epsilon: float = 1e-5) -> Whiten:
        """Compute the whitening of uint8 images [n, channels, height, width]; epsilon >= 0 bounds the gain."""
        d = images[0].numel()
        total = torch.zeros(d, dtype=torch.float64)
        products = torch.zeros(d, d, dtype=torch.float64)
        for chunk in images.split(CHUNK):
            values = contrast(chunk).flatten(1)
            total += values.sum(0, dtype=torch.float64)
            products += values.T @ values
        mean = total / len(images)
        covariance = products / len(images) - torch.outer(mean, mean)
        eigenvalues, basis = torch.linalg.eigh(covariance)
        # float32 products can push a zero eigenvalue below zero by rounding
        scale = (eigenvalues.clamp(min=0) + epsilon).rsqrt()
        return cls(mean, (basis * scale) @ basis.T)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 images whose pixels are uncorrelated, with variance 1, over the images fitted to."""
        # The covariance spans six orders of magnitude, more than bfloat16 can carry.
        with torch.autocast(images.device.type, enabled=False):
            return ((contrast(images).flatten(1) - self.mean) @ self.matrix).view(images.shape)

    def whiten_all(self, images: Tensor) -> Tensor:
        """Whiten any number of images, a part of them in floating point at a time."""
        return torch.cat([self(chunk) for chunk in images.split(CHUNK)])


def contrast(images: Tensor) -> Tensor:
    """Scale each image to mean 0 and standard deviation 1 (with n - 1) over channels and pixels; a flat one becomes 0.

    Example:
        >>> contrast(torch.tensor([[[[1.0, 2.0, 3.0]]]]))
        tensor([[[[-1.,  0.,  1.]]]])
    """
    values = images.float()
    values = values - values.mean((1, 2, 3), keepdim=True)
    return values / values.std((1, 2, 3), keepdim=True).clamp(min=1e-8)
