"""The norms of output filters: of one parameter, or of all at once where a call is dear."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_entropy.engine.flat import CHUNK, is_dense, joined, runs


def filter_norms(param: Tensor) -> Tensor:
    """Compute the norm of each output filter, ready to broadcast.

    Args:
        param: (out, ...) with two dimensions or more; a vector or scalar counts as one filter.

    Returns:
        (out, 1, ...), or a scalar for a vector.

    Example:
        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])

    References:
        Bisla, Wang and Choromanska, Low-pass filtering SGD, AISTATS 2022, arXiv:2201.08025.
    """
    if param.dim() < 2:
        return torch.linalg.vector_norm(param)
    return torch.linalg.vector_norm(param, dim=tuple(range(1, param.dim())), keepdim=True)


def all_filter_norms(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Compute :func:`filter_norms` of every parameter: one by one on the CPU, elsewhere in few calls.

    Args:
        params: of any shapes and devices.
        dtypes: in which each is computed.

    Returns:
        One per parameter, new tensors.
    """
    norms: dict[int, Tensor] = {}
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (p, dtype) in enumerate(zip(params, dtypes, strict=True)):
        if one_by_one(p) or p.is_complex() or p.numel() == 0 or not is_dense(p):
            norms[i] = filter_norms(p.detach().to(dtype))
        else:
            together.setdefault((p.device, dtype), []).append(i)
    for (device, dtype), indices in together.items():
        for run in runs([params[i].numel() for i in indices], CHUNK):
            some = [indices[j] for j in run]
            squares = joined([params[i].detach() for i in some], dtype)
            squares.mul_(squares)
            lengths = lengths_of(tuple(filters_of(params[i]) for i in some), device)
            found = torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True).sqrt_()
            parts = found.split([filters_of(params[i])[0] for i in some])
            shapes = [(p.shape[0], *[1] * (p.dim() - 1)) if p.dim() > 1 else () for p in (params[i] for i in some)]
            norms |= {i: part.view(shape) for i, part, shape in zip(some, parts, shapes, strict=True)}
    return [norms[i] for i in range(len(params))]


def one_by_one(param: Tensor) -> bool:
    """Whether the norms of a parameter are taken alone: on the CPU, where a call costs little."""
    return param.device.type == "cpu"


def filters_of(param: Tensor) -> tuple[int, int]:
    """Return how many output filters a parameter has, and how many weights a filter."""
    if param.dim() < 2:
        return 1, param.numel()
    return param.shape[0], param.numel() // max(param.shape[0], 1)


@functools.lru_cache(maxsize=16)
def lengths_of(filters: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the number of weights of every filter, in one tensor that is made once.

    Args:
        filters: (how many, weights of each) per parameter.
        device: where the tensor is.
    """
    counts, sizes = zip(*filters, strict=True)
    return torch.repeat_interleave(torch.tensor(sizes), torch.tensor(counts), output_size=sum(counts)).to(device)
