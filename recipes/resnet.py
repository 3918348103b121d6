"""ResNet-18 for small images.

Train it with ``python -m recipes.resnet fit``, ``--config recipes/configs/nets/resnet18.yaml`` and a ``--config`` of
``recipes/configs/methods``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from recipes.limits import check


class ResNet18(nn.Module):
    """ResNet-18 as CIFAR papers have it: a 3x3 convolution in the place of the first 7x7 one, and no pooling after it.

    Args:
        width: channels of the first of four groups; each of the others has twice those before. 64 is the usual net.
        num_classes: logits.
        channels: of an image.

    Raises:
        ValueError: if ``width`` is out of its range.

    Example:
        >>> [sum(p.numel() for p in ResNet18(width).parameters()) for width in (16, 64)]
        [701466, 11173962]

    References:
        He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016, arXiv:1512.03385.
    """

    def __init__(self, width: int = 64, *, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        check("width", width, 1, 1000)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for group in range(4):
            after = width * 2**group
            layers += [Block(before, after, 1 if group == 0 else 2), Block(after, after, 1)]
            before = after
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, height, width] to logits [n, num_classes]."""
        return self.head(self.layers(images).mean((2, 3)))


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input, then ReLU; the input through a 1x1 convolution where the shape changes.

    Args:
        before: channels in.
        after: channels out.
        stride: of the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, before, height, width] to [n, after, height / stride, width / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


if __name__ == "__main__":
    from recipes.cli import main

    main()
