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


def joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy the :func:`flat` numbers of tensors into one line, in one call.

    Args:
        tensors: dense and not complex, on one device.
        dtype: of the line.

    Example:
        >>> joined([torch.tensor([1, 2]), torch.tensor([[3]])], torch.float32)
        tensor([1., 2., 3.])
    """
    if all(t.dtype == dtype for t in tensors):
        return torch.cat([flat(t) for t in tensors])
    sizes = [t.numel() for t in tensors]
    line = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_([shaped(part, t) for part, t in zip(line.split(sizes), tensors, strict=True)], list(tensors))
    return line


def in_line(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of contiguous tensors of one type in one line: a view where they lie so in memory.

    Example:
        >>> parts = torch.tensor([1.0, 2.0, 3.0]).split([2, 1])
        >>> in_line(parts).data_ptr() == parts[0].data_ptr()
        True
    """
    first, at = tensors[0], 0
    sizes = [t.numel() for t in tensors]
    for t, size in zip(tensors, sizes, strict=True):
        if t.data_ptr() != first.data_ptr() + at * first.element_size():
            return torch.cat([t.reshape(-1) for t in tensors])
        at += size
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if at > room:  # another's memory, by chance behind
        return torch.cat([t.reshape(-1) for t in tensors])
    return first.as_strided((at,), (1,))


def _has_channels_last(t: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()])
