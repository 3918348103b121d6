"""Many tensors as one line of numbers, to be sent; and what is asked of the line on its device."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of all tensors, copied into one on the first one's device: float64 if any is, else float32."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=wide, device=tensors[0].device if tensors else None)
    pieces = [piece.view(t.shape) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    # Apart: one tensor in another order in memory, and a list of copies is made one by one on a GPU.
    for contiguous in (True, False):
        some = [i for i, t in enumerate(tensors) if t.is_contiguous() is contiguous]
        F.copy_([pieces[i] for i in some], [tensors[i].detach() for i in some])
    return flat


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of a flat tensor in the shapes and on the devices of others; views of it where it is there."""
    sizes = [t.numel() for t in like]
    pieces = {device: flat.to(device).split(sizes) for device in {t.device for t in like}}
    return [pieces[t.device][i].view(t.shape) for i, t in enumerate(like)]


def finite(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return of each part whether all its values are finite, on their device, which is not waited for.

    Args:
        flat: values, in one dimension.
        sizes: of the parts, the first by far the largest.

    Example:
        >>> finite(torch.tensor([1.0, 2.0, torch.nan, 3.0]), [2, 1, 0, 1])
        tensor([ True, False,  True,  True])
    """
    first = flat[: sizes[0]]
    if len(first):  # the norm is nan where a value is
        judged = torch.linalg.vector_norm(first, torch.inf).reshape(1) < torch.inf
    else:
        judged = torch.ones(1, dtype=torch.bool, device=flat.device)
    if len(sizes) == 1:
        return judged
    # A part's values are all good if as many of them are counted as there are.
    counts = flat[sizes[0] :].isfinite().cumsum(0, dtype=torch.int32)
    ends = numbers_on(flat.device, list(accumulate(sizes[1:], initial=0)))
    upto = torch.cat([counts.new_zeros(1), counts])[ends]
    return torch.cat([judged, upto.diff() == ends.diff()])


def spread_out(parts: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return for every value what its part has, on their device, which is not waited for.

    Args:
        parts: a value for each.
        sizes: of the parts.

    Example:
        >>> spread_out(torch.tensor([7, 8]), [1, 2])
        tensor([7, 8, 8])
    """
    return parts.repeat_interleave(numbers_on(parts.device, sizes), output_size=sum(sizes))


def numbers_on(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """Return numbers on a device, which is not waited for."""
    there = torch.tensor(numbers)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


def squared_distance(tensors: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sum of squares of tensors less their means, which begin flat values on their device."""
    flat = flatten(tensors)
    return torch.nn.functional.mse_loss(flat, means[: flat.numel()], reduction="sum")
