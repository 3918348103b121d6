"""Where a batch keeps its examples: how many there are, and along which dimension of each tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor

Batch = Any
Number = int | float | str | bytes | None
Examples = int | Callable[[Batch], int] | None
BatchDim = int | Callable[[Batch], int] | None


@dataclass(frozen=True)
class Layout:
    """How the examples of a batch are counted and cut.

    Without any argument the number of examples is the one size that all tensors share: the first one's of each tensor
    if those agree (batch first), else the one size found in all of them (a time-first sequence beside its targets).
    Tensors without a dimension do not count.

    Args:
        batch_dim: The dimension that counts examples in every tensor that has it, or a callable from a batch to it. A
            tensor with fewer dimensions is cut where its one dimension of that size is. None: the rule above.
        count: Number of examples in a batch, for batches whose tensors do not say it. None: by the tensors' sizes.

    Raises:
        ValueError: If an argument is of another kind.

    Example:
        >>> series, targets = torch.zeros(20, 6, 4), torch.zeros(6)
        >>> Layout().size((series, targets)), Layout(batch_dim=1).size(series)
        (6, 6)
        >>> [t.shape for t in Layout().cut((series, targets), 0, 2)]
        [torch.Size([20, 2, 4]), torch.Size([2])]
        >>> Layout().cut({"x": torch.arange(4), "ids": ["a", "b", "c", "d"]}, 1, 3)
        {'x': tensor([1, 2]), 'ids': ['b', 'c']}
    """

    batch_dim: BatchDim = None
    count: Callable[[Batch], int] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.batch_dim, int) and not isinstance(self.batch_dim, bool)
        if not (self.batch_dim is None or whole or callable(self.batch_dim)):
            raise ValueError(
                f"batch_dim must be None, an integer or a callable (batch) -> integer, got {self.batch_dim!r}"
            )

    def size(self, batch: Batch) -> int:
        """Count the examples of a batch.

        Raises:
            ValueError: If the batch does not say, or says two numbers.
        """
        if self.count is not None:
            size = self.count(batch)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"examples must be a callable (batch) -> integer of at least 0, got {size!r} from it")
            return size
        shapes = [leaf.shape for leaf in leaves(batch) if leaf.ndim]
        if not shapes:
            raise ValueError(
                f"a batch must hold a tensor with a batch dimension, got {type(batch).__name__}: say how many examples "
                "it has with examples=, a callable (batch) -> integer"
            )
        dim = self._dim(batch)
        if dim is not None:
            sizes = {shape[dim] for shape in shapes if -len(shape) <= dim < len(shape)}
            if len(sizes) == 1:
                return sizes.pop()
            raise ValueError(
                f"batch_dim must be a dimension in which the tensors of a batch have one size, got {dim} for shapes "
                f"{_listed(shapes)}: say how many examples it has with examples=, a callable (batch) -> integer"
            )
        first = {shape[0] for shape in shapes}
        shared = first if len(first) == 1 else set.intersection(*(set(shape) for shape in shapes))
        if len(shared) == 1:
            return shared.pop()
        raise ValueError(
            "the tensors of a batch must share one size, the number of examples, got shapes "
            f"{_listed(shapes)}: say which dimension counts them with batch_dim=, or how many there are with "
            "examples=, a callable (batch) -> integer"
        )

    def dims(self, batch: Batch) -> list[int | None]:
        """Return the dimension that counts examples of each tensor, in order; None for one that all examples share.

        Raises:
            ValueError: If a tensor has several dimensions of that size and nothing says which one it is.
        """
        size, dim = self.size(batch), self._dim(batch)
        tensors = leaves(batch)
        first = dim is None and all(t.shape[0] == size for t in tensors if t.ndim)
        return [self._counting(t, size, 0 if first else dim) for t in tensors]

    @staticmethod
    def _counting(tensor: Tensor, size: int, dim: int | None) -> int | None:
        if dim is not None and -tensor.ndim <= dim < tensor.ndim:
            return dim % tensor.ndim if tensor.shape[dim] == size else None
        of_size = [d for d, s in enumerate(tensor.shape) if s == size]
        if len(of_size) > 1:
            raise ValueError(
                f"one dimension of a tensor must count its examples, got {len(of_size)} of size {size} in shape "
                f"{tuple(tensor.shape)}: say which one with batch_dim="
            )
        return of_size[0] if of_size else None

    def cuts(self, batch: Batch) -> list[int | None]:
        """Return the dimensions of :meth:`dims` of a batch that is to be cut into its examples.

        Raises:
            ValueError: If there is none, or as :meth:`dims`.
        """
        dims = self.dims(batch)
        if all(dim is None for dim in dims):
            raise ValueError(
                f"a batch must have a dimension that counts its {self.size(batch)} examples to be cut into them, got "
                f"{type(batch).__name__} of shapes {_listed([t.shape for t in leaves(batch)])}: say which one with "
                "batch_dim=, or take data of one example a batch"
            )
        return dims

    def cut(self, batch: Batch, start: int, stop: int) -> Batch:
        """Take examples ``start`` to ``stop``: of tensors, and of lists of one number or string for each example.

        Raises:
            ValueError: If the batch has no tensor that can be cut, or the part would be read in another dimension.
        """
        size = self.size(batch)
        if (start, stop) == (0, size):
            return batch
        dims = self.cuts(batch)
        part = cut_along(batch, dims, size, start, stop)
        if self.batch_dim is None and any(dims) and all(len(t) == stop - start for t in leaves(part) if t.ndim):
            raise ValueError(
                f"examples {start} to {stop} of a batch must not look like another batch, got shapes "
                f"{_listed([t.shape for t in leaves(part)])}, which read as batch first, from "
                f"{_listed([t.shape for t in leaves(batch)])}, which do not: say which dimension counts examples with "
                "batch_dim="
            )
        return part

    def lists(self, batch: Batch) -> bool:
        """Whether a batch holds a list of one number or string for each example."""
        size, found = self.size(batch), []

        def keep(values: list[Any]) -> list[Any]:
            found.append(len(values) == size)
            return values

        _map(batch, lambda t: t, keep)
        return any(found)

    def _dim(self, batch: Batch) -> int | None:
        return self.batch_dim(batch) if callable(self.batch_dim) else self.batch_dim


def checked_examples(examples: Examples, least: int = 1) -> Examples:
    """Return ``examples`` if it is None, a number of at least ``least``, or a callable.

    Raises:
        ValueError: It is not.
    """
    if examples is None or callable(examples) or examples >= least:
        return examples
    raise ValueError(f"examples must be None or at least {least}, got {examples}")


def cut_along(batch: Batch, dims: Sequence[int | None], size: int, start: int, stop: int) -> Batch:
    """Take examples ``start`` to ``stop`` of a batch of ``size`` along the given dimension of each tensor.

    Example:
        >>> cut_along([torch.arange(4), torch.ones(1)], [0, None], 4, 1, 3)
        [tensor([1, 2]), tensor([1.])]
    """
    supply = iter(dims)

    def narrow(tensor: Tensor) -> Tensor:
        dim = next(supply)
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)

    return _map(batch, narrow, lambda values: values[start:stop] if len(values) == size else values)


def map_batch(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Apply a function to every tensor of a batch, in every collection that Lightning moves, and keep the rest.

    Example:
        >>> map_batch({"x": [torch.tensor(1)]}, lambda t: t + 1)
        {'x': [tensor(2)]}
    """
    return apply_to_collection(batch, Tensor, function)


def leaves(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch in the order in which :func:`map_batch` meets them."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_batch(batch, keep)
    return found


def _map(batch: Batch, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]]) -> Batch:
    """Apply one function to every tensor and another to every list of numbers or strings."""

    def function(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensors(value)
        if value and all(isinstance(v, Number) for v in value):
            return lists(value)
        return [_map(v, tensors, lists) for v in value]

    return apply_to_collection(batch, (Tensor, list), function)


def _listed(shapes: list[torch.Size]) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in shapes]
