"""Carry out a plan: the images of a batch, flipped and cropped, all at once and on their device."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.data.plan import FLIP, INDEX, LEFT, TOP


def draw(images: Tensor, plan: Tensor, crop: int) -> Tensor:
    """Take the images of a plan, flip them, pad them by reflection and cut windows of their own size.

    Pixel (i, j) is image(r(i + top - crop), r(j' + left - crop)): r reflects a coordinate at the first and last pixel,
    which are not repeated, and j' counts from the right in a flipped image. No padded image is made: the rows wanted
    are copied from where they are, then their columns are put in order.

    Args:
        images: all there are, any type, contiguous, [n, channels, height, width].
        plan: int64 [batch, 4], rows (index, flip, top, left); top, left in [0, 2 * crop].
        crop: pixels of padding on every side, in [0, min(height, width)).

    Returns:
        [batch, channels, height, width], of the type of ``images``.

    Raises:
        ValueError: if ``crop`` is out of its range.

    Example:
        >>> images = torch.tensor([[[[1, 2, 3]]], [[[4, 5, 6]]]])
        >>> draw(images, torch.tensor([[1, 1, 0, 0]]), crop=0)
        tensor([[[[6, 5, 4]]]])
    """
    _, channels, height, width = images.shape
    if not 0 <= crop < min(height, width):
        raise ValueError(f"crop must be in [0, {min(height, width)}), got {crop}")
    rows = _reflect(_window(plan[:, TOP], height) - crop, height)
    columns = _reflect(_window(plan[:, LEFT], width) - crop, width)
    columns = torch.where(plan[:, FLIP, None].bool(), columns.flip(1), columns)
    channel = plan[:, INDEX, None] * channels + torch.arange(channels, device=plan.device)
    rows = channel[:, :, None] * height + rows[:, None, :]
    batch = images.view(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)
    return batch.gather(3, columns[:, None, None, :].expand(batch.shape))


def _window(first: Tensor, length: int) -> Tensor:
    return first[:, None] + torch.arange(length, device=first.device)


def _reflect(at: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - at.abs()).abs()
