"""LeNet-BN, the papers' net for MNIST.

Train it with ``python -m recipes.lenet fit``, ``--config recipes/configs/nets/lenet.yaml`` and a ``--config`` of
``recipes/configs/methods``.
"""

from __future__ import annotations

from torch import Tensor, nn

from recipes.limits import check


class LeNet(nn.Module):
    """LeNet-BN: two 5x5 convolutions and two linear layers, BatchNorm after each pooling, dropout after each layer.

    The order (convolution, ReLU, max-pooling, BatchNorm, dropout) is that of the code which produced the paper's
    numbers.

    Args:
        num_classes: logits.
        dropout: probability, in [0, 1). The paper has 0.25; its released code 0.5.
        channels: of an image of 28 x 28.

    Raises:
        ValueError: if ``dropout`` is out of its range.

    Example:
        >>> sum(p.numel() for p in LeNet().parameters())
        131220
    """

    def __init__(self, num_classes: int = 10, *, dropout: float = 0.25, channels: int = 1) -> None:
        super().__init__()
        check("dropout", dropout, 0, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.BatchNorm2d(20),
            nn.Dropout(dropout),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(50),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(200, 500),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(500, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, 28, 28] to logits [n, num_classes]."""
        return self.layers(images)


if __name__ == "__main__":
    from recipes.cli import main
    from recipes.messages import run

    run(main)
