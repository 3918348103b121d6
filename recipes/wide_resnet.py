"""Wide residual nets.

Train one with ``python -m recipes.wide_resnet fit``, ``--config recipes/configs/nets/wrn_28_10.yaml`` and a
``--config`` of ``recipes/configs/methods``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from recipes.limits import check


class WideResNet(nn.Module):
    """Wide residual net WRN-depth-width with pre-activation blocks, for images of 32 x 32.

    Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels; the second and third halve
    the image. He initialisation by fan-out, no bias in the convolutions.

    Args:
        depth: 6 n + 4 with n >= 1: 10, 16, 22, 28, 40; at most 1000.
        width: widening factor, in [1, 1000].
        dropout: probability to drop a value between the two convolutions of a block, in [0, 1).
        num_classes: logits.
        channels: of an image.

    Raises:
        ValueError: if ``depth`` is not of that form, or a number is out of its range.

    Example:
        >>> sum(p.numel() for p in WideResNet(16, 4).parameters())
        2748890

    References:
        Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        *,
        dropout: float = 0.0,
        num_classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1, got {depth}")
        check("depth", depth, 10, 1000)
        check("width", width, 1, 1000)
        check("dropout", dropout, 0, 1)
        before = 16
        layers: list[nn.Module] = [nn.Conv2d(channels, before, 3, padding=1, bias=False)]
        for after, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for block in range((depth - 4) // 6):
                layers.append(Block(before, after, stride if block == 0 else 1, dropout))
                before = after
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU())
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, height, width] to logits [n, num_classes]."""
        return self.head(self.layers(images).mean((2, 3)))


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-dropout-conv, plus the input.

    Where the width changes, the input's activation is added instead, through a 1x1 convolution.

    Args:
        before: channels in.
        after: channels out.
        stride: of the first convolution.
        dropout: before the second convolution.
    """

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, before, height, width] to [n, after, height / stride, width / stride]."""
        activated = F.relu(self.bn1(x))
        y = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


if __name__ == "__main__":
    from recipes.cli import main
    from recipes.messages import run

    run(main)
