"""A fully connected net for images: one of the comparisons' development set."""

from __future__ import annotations

from torch import Tensor, nn

from recipes.limits import check


class MLP(nn.Module):
    """Two hidden layers with ReLU and no normalisation, on the pixels of an image.

    Args:
        num_classes: logits.
        channels: of an image.
        size: of an image's side, in pixels.
        width: of both hidden layers.

    Raises:
        ValueError: if a size is out of its range.

    Example:
        >>> sum(p.numel() for p in MLP(width=256).parameters())
        269322
    """

    def __init__(self, num_classes: int = 10, *, channels: int = 1, size: int = 28, width: int = 256) -> None:
        super().__init__()
        check("width", width, 1, 1 << 16)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * size**2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, size, size] to logits [n, num_classes]."""
        return self.layers(images)
