"""Many tensors as one line of numbers, so that one call does for all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 25  # numbers that are taken together, where memory for a copy of them is needed


def runs(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a list into runs of neighbours whose sizes add up to at most ``limit``, or which are one alone.

    Example:
        >>> runs([3, 3, 9, 1], 6)
        [[0, 1], [2], [3]]
    """
    cut: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            cut.append([])
            room = limit
        cut[-1].append(i)
        room -= size
    return cut


def is_dense(t: Tensor) -> bool:
    """Whether a tensor's numbers are known to lie in memory without gaps, one index of the first dimension by one."""
    return t.is_contiguous() or _has_channels_last(t)


def flat(t: Tensor) -> Tensor:
    """Return the numbers of a tensor in one dimension: in the order of its memory where that :func:`is_dense`."""
    if not t.is_contiguous() and _has_channels_last(t):
        t = t.movedim(1, -1)
    return t.reshape(-1)


def shaped(line: Tensor, like: Tensor) -> Tensor:
    """View :func:`flat` numbers in the shape of a tensor; a complex one's two parts stand side by side.

    Args:
        line: one dimension.
        like: of that many numbers, and in the order of memory that they are in.
    """
    if like.is_complex():
        return torch.view_as_complex(line.view(*like.shape, 2))
    if is_dense(like):
        return line.as_strided(like.shape, like.stride(), line.storage_offset())
    return line.view(like.shape)


def _has_channels_last(t: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()])
