"""Parameters of which every rank has a part: DTensors, made by ``fully_shard`` (FSDP2) or a tensor-parallel plan.

The engine computes on the parts alone, which are plain tensors. What it needs of a whole parameter is here: norms, the
place of a part in the whole (for noise and for saved states), and a DTensor around a tensor of parts. Parameters that
are plain tensors pass through every function as they are.

What ranks do together, they do on every rank at once and in one order, as in all code on DTensors.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Module

from lightning_entropy.engine import torch_internals

Dims = frozenset[int]  # of a mesh


class Region(NamedTuple):
    """Where a rank's part of a parameter is in the whole, row by row.

    Attributes:
        shape: of the whole.
        slices: of the part, one per dimension.
    """

    shape: tuple[int, ...]
    slices: tuple[slice, ...]

    @property
    def span(self) -> tuple[int, int]:
        """The first number of the whole that is in the part, and the end of the last: the part may have gaps."""
        if any((s.start, s.stop) != (0, n) for s, n in zip(self.slices[1:], self.shape[1:], strict=True)):
            return 0, math.prod(self.shape)
        row = math.prod(self.shape[1:])
        return (self.slices[0].start * row, self.slices[0].stop * row) if self.slices else (0, 1)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, by reference. To be called without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_host(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return a plain tensor's copy in the host's memory, pinned where it is CUDA's: it arrives when CUDA gets there."""
    there = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return there.copy_(tensor, non_blocking=True)


def region_of(param: Tensor) -> Region | None:
    """Return where this rank's part of a parameter is; None for a plain tensor.

    Raises:
        ValueError: placements whose parts are not one block of the whole.
    """
    if not isinstance(param, DTensor):
        return None
    mesh = param.device_mesh
    splits: list[tuple[bool, int, int, int]] = []
    for axis, placement in enumerate(param.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            late = torch_internals.splits_last(placement)
            splits.append((late, dim % max(param.dim(), 1), mesh.size(axis), mesh.get_local_rank(axis)))
        elif not placement.is_replicate():
            raise ValueError(f"parameters must be sharded or replicated, got the placements {param.placements}")
    region = _region(tuple(param.shape), tuple(splits))
    if tuple(s.stop - s.start for s in region.slices) != torch_internals.part_shape(param):
        raise ValueError(f"a rank's part of a parameter must be one block of it, got the placements {param.placements}")
    return region


@functools.lru_cache(maxsize=4096)
def _region(shape: tuple[int, ...], splits: tuple[tuple[bool, int, int, int], ...]) -> Region:
    """Split as torch.chunk does, mesh axis by mesh axis; FSDP's on top of a tensor-parallel one comes last."""
    bounds = [(0, n) for n in shape]
    for _, dim, size, rank in sorted(splits, key=lambda split: split[0]):
        start, stop = bounds[dim]
        chunk = -(-(stop - start) // size)
        bounds[dim] = min(start + rank * chunk, stop), min(start + (rank + 1) * chunk, stop)
    return Region(shape, tuple(slice(*b) for b in bounds))


def whole(part: Tensor, param: Tensor) -> Tensor:
    """Return a tensor of which ``part`` is this rank's part, placed as a parameter is; it shares memory with it."""
    if not isinstance(param, DTensor):
        return part
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def part_of(value: Tensor, param: Tensor) -> Tensor:
    """Return this rank's part of a value that is to go into a parameter.

    Args:
        value: a whole tensor (the same on every rank), or a DTensor, of the parameter's shape. A DTensor of other
            placements is a collective.
        param: the parameter.
    """
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor):
        if tuple(value.placements) != tuple(param.placements):
            value = value.redistribute(param.device_mesh, param.placements)
        return value.to_local()
    region = region_of(param)
    assert region is not None
    return value[region.slices]


def gradient_of(param: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter's gradient, by reference.

    A gradient that is still to be summed over ranks (of a replicated parameter in a tensor-parallel plan) is summed
    now, and stays so.
    """
    gradient = param.grad
    if isinstance(param, DTensor) and isinstance(gradient, DTensor):
        if tuple(gradient.placements) != tuple(param.placements):
            param.grad = gradient = gradient.redistribute(param.device_mesh, param.placements)
        return gradient.to_local()
    return gradient


def _axes(param: Tensor, *, inner: bool) -> Dims:
    """Return the axes of the mesh over which a parameter is sharded; with ``inner``, but along its first dimension."""
    if not isinstance(param, DTensor):
        return frozenset()
    dims = [getattr(placement, "dim", None) for placement in param.placements]
    return frozenset(axis for axis, dim in enumerate(dims) if dim is not None and (dim > 0 or not inner))


def joined_norms(norms: Sequence[Tensor], params: Sequence[Tensor], *, by_filter: bool = False) -> list[Tensor]:
    """Compute norms of whole parameters from those of the ranks' parts. A collective where there are parts.

    Args:
        norms: of the parts, of any shape, one per parameter.
        params: the parameters.
        by_filter: a norm per index of the first dimension, for parameters of two dimensions or more.

    Returns:
        One per parameter; the norm itself where the part has all that it is of.
    """
    joined = list(norms)
    together: dict[tuple[DeviceMesh, Dims], list[int]] = {}
    for i, p in enumerate(params):
        axes = _axes(p, inner=by_filter and p.dim() > 1)
        if axes and isinstance(p, DTensor):
            together.setdefault((p.device_mesh, axes), []).append(i)
    for (mesh, axes), indices in together.items():
        squares = torch.cat([norms[i].reshape(-1).square() for i in indices])
        sums = _sum_over(squares, mesh, axes).sqrt()
        parts = sums.split([norms[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            joined[i] = part.view(norms[i].shape)
    return joined


def anywhere(flags: Sequence[bool], params: Sequence[Tensor]) -> list[bool]:
    """Return what is true on any of the ranks that have parts of a parameter. A collective where there are parts.

    Args:
        flags: one per parameter.
        params: the parameters.
    """
    found = list(flags)
    together: dict[DeviceMesh, list[int]] = {}
    for i, p in enumerate(params):
        if isinstance(p, DTensor):
            together.setdefault(p.device_mesh, []).append(i)
    for mesh, indices in together.items():
        counts = torch.tensor([float(flags[i]) for i in indices])
        counts = _sum_over(counts, mesh, frozenset(range(mesh.ndim)))
        for i, count in zip(indices, counts.tolist(), strict=True):
            found[i] = count > 0
    return found


def _sum_over(numbers: Tensor, mesh: DeviceMesh, axes: Dims) -> Tensor:
    there = numbers.to(mesh.device_type)  # where the mesh's groups work, though the parts may be kept on the CPU
    there = there.clone() if there is numbers else there
    for axis in sorted(axes):
        dist.all_reduce(there, group=mesh.get_group(axis))
    return there.to(numbers.device)


def is_sharded(params: Iterable[Tensor]) -> bool:
    """Whether any of the parameters is a DTensor."""
    return any(isinstance(p, DTensor) for p in params)


def mapped(state: Any, change: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """Return a copy of a nested state, of dicts and lists, with other tensors.

    Args:
        state: that has them.
        change: of the keys that lead to a tensor, with a slash before each, and the tensor.
        path: that leads to the state.

    Example:
        >>> mapped({"a": [torch.tensor(1), 2]}, lambda path, tensor: path)
        {'a': ['/a/0', 2]}
    """
    if isinstance(state, Tensor):
        return change(path, state)
    if isinstance(state, Mapping):
        return {k: mapped(v, change, f"{path}/{k}") for k, v in state.items()}
    if isinstance(state, list):
        return [mapped(v, change, f"{path}/{i}") for i, v in enumerate(state)]
    return state


class Gathered:
    """The copies of whole parameters that FSDP2 keeps beside the parts, from a forward pass on to the next backward.

    Weights that are written meanwhile would not be in them, and the next forward pass would see the old ones: so they
    are dropped before a write, and gathered anew when they are needed.

    Args:
        module: whose submodules may have some; None: there are none.
    """

    def __init__(self, module: Module | None) -> None:
        modules = [] if module is None else module.modules()
        self._modules = [m for m in modules if isinstance(m, FSDPModule)]

    def drop(self) -> None:
        """Drop them: the module's parameters are DTensors again."""
        for module in self._modules:
            module.reshard()
