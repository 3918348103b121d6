"""All-CNN-BN, the net of the Entropy-SGD paper.

Train it with ``python -m recipes.allcnn fit``, ``--config recipes/configs/nets/allcnn.yaml`` and a ``--config`` of
``recipes/configs/methods``.
"""

from __future__ import annotations

from torch import Tensor, nn

from recipes.limits import check


class AllCNN(nn.Module):
    """All-CNN-BN: nine convolutions, two of which stride, each with BatchNorm and ReLU, then the mean over pixels.

    The net of the paper's code, not of Springenberg et al.'s All-CNN-C: two 3x3 convolutions and one 1x1 at the end,
    and BatchNorm and ReLU also after the last one, so that no logit is below zero. 1,667,166 parameters at the
    default width.

    Args:
        num_classes: logits.
        width: channels of the first three convolutions, in [1, 1000]; the others have twice as many.
        input_dropout: probability to drop an input pixel's channel value, in [0, 1).
        dropout: probability to drop a value before the second and third group of convolutions, in [0, 1). The paper
            has 0.5, Parle's experiments with augmented images 0.
        channels: of an image.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> sum(p.numel() for p in AllCNN().parameters())
        1667166
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: int = 96,
        input_dropout: float = 0.2,
        dropout: float = 0.5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        check("width", width, 1, 1000)
        check("input_dropout", input_dropout, 0, 1)
        check("dropout", dropout, 0, 1)
        wide = 2 * width
        self.layers = nn.Sequential(
            nn.Dropout(input_dropout),
            *_block(channels, width, 3),
            *_block(width, width, 3),
            *_block(width, width, 3, stride=2),
            nn.Dropout(dropout),
            *_block(width, wide, 3),
            *_block(wide, wide, 3),
            *_block(wide, wide, 3, stride=2),
            nn.Dropout(dropout),
            *_block(wide, wide, 3),
            *_block(wide, wide, 3),
            *_block(wide, num_classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, height, width] to logits [n, num_classes], each >= 0."""
        return self.layers(images).mean((2, 3))


def _block(before: int, after: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2)
    return convolution, nn.BatchNorm2d(after), nn.ReLU()


if __name__ == "__main__":
    from recipes.cli import main
    from recipes.messages import run

    run(main)
