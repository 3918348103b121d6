"""Carry out the flips and crops of a plan, for a whole batch and on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.data.plan import FLIP, LEFT, TOP


def flip_and_crop(images: Tensor, plan: Tensor, crop: int) -> Tensor:
    """Flip, pad by reflection and cut a window of the image's own size.

    Pixel (i, j) is image(r(i + top - crop), r(j' + left - crop)): r reflects a coordinate at the first and last pixel,
    which are not repeated, and j' counts from the right in a flipped image. No padded image is made.

    Args:
        images: any type, [n, channels, height, width].
        plan: int64 [n, 4], rows (index, flip, top, left), whose index is not used; top, left in [0, 2 * crop].
        crop: pixels of padding on every side, in [0, min(height, width)).

    Raises:
        ValueError: if ``crop`` is out of its range.

    Example:
        >>> row = torch.tensor([[[[1, 2, 3]]]])
        >>> flip_and_crop(row, torch.tensor([[0, 1, 0, 0]]), crop=0)
        tensor([[[[3, 2, 1]]]])
    """
    height, width = images.shape[-2:]
    if not 0 <= crop < max(min(height, width), 1):
        raise ValueError(f"crop must be in [0, {min(height, width)}), got {crop}")
    rows = _reflect(_window(plan[:, TOP], height) - crop, height)
    columns = _reflect(_window(plan[:, LEFT], width) - crop, width)
    columns = torch.where(plan[:, FLIP, None].bool(), columns.flip(1), columns)
    rows = rows[:, None, :, None].expand(images.shape)
    columns = columns[:, None, None, :].expand(images.shape)
    return images.gather(2, rows).gather(3, columns)


def _window(first: Tensor, length: int) -> Tensor:
    return first[:, None] + torch.arange(length, device=first.device)


def _reflect(at: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - at.abs()).abs()
