"""Batches to measure on: a fixed choice of examples from a loader that training may be using at this moment."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

Batch = Any
# Samplers that only order or shard the dataset; any other one chooses, and its choice is respected.
_ORDERINGS = (SequentialSampler, RandomSampler, DistributedSampler)


def take_batches(data: Iterable[Batch], examples: int | None = None, *, seed: int = 0) -> list[Batch]:
    """Take ``examples`` examples from a loader or any iterable of batches, as a list of batches.

    A ``DataLoader`` over a map-style dataset is not iterated: its dataset is read directly, in this process, with
    the loader's collate function and batch size, so that a training loop over the same loader (persistent workers
    included) does not notice. If fewer examples are asked for than there are, a random choice that depends on
    ``seed`` alone is taken, the same at every call. A sampler that leaves examples out is respected; one that
    shards the dataset over ranks is not, nor is sampling with replacement.

    Args:
        data: A ``DataLoader``, a list of batches, or another iterable of batches.
        examples: How many, >= 1. None: all. All of them are kept in memory.
        seed: Of the choice.

    Returns:
        Batches; the last may be smaller. Together at most ``examples`` examples.

    Raises:
        ValueError: If ``examples`` is not positive or ``data`` holds no example.

    Example:
        >>> [b.tolist() for b in take_batches([torch.tensor([1, 2]), torch.tensor([3, 4])], 3)]
        [[1, 2], [3]]
    """
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be None or at least 1, got {examples}")
    if isinstance(data, DataLoader):
        data = _quiet_loader(data, examples, seed)
    batches, left = [], examples
    for batch in data:
        size = batch_size(batch)
        if left is not None and size >= left:
            batches.append(batch if size == left else slice_batch(batch, 0, left))
            break
        if size:
            batches.append(batch)
        left = None if left is None else left - size
    if not batches:
        raise ValueError("data must hold at least one example, got an empty loader")
    return batches


def _quiet_loader(loader: DataLoader, examples: int | None, seed: int) -> Iterable[Batch]:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    if loader.batch_size is None and loader.batch_sampler is None:
        return (loader.collate_fn(dataset[i]) for i in range(len(dataset)))  # type: ignore[arg-type]

    if loader.batch_size is None:
        indices = list(chain.from_iterable(_indices(loader.batch_sampler)))
        size = max(1, min(256, len(indices)))
    else:
        whole = isinstance(loader.sampler, _ORDERINGS)
        indices = list(range(len(dataset))) if whole else _indices(loader.sampler)  # type: ignore[arg-type]
        size = loader.batch_size
    if examples is not None and examples < len(indices):
        choice = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:examples]
        indices = [indices[i] for i in choice.tolist()]
    return DataLoader(Subset(dataset, indices), batch_size=size, collate_fn=loader.collate_fn)


def _indices(sampler: Any) -> list[Any]:
    """Read a sampler through, leaving its own generators as they were."""
    owners = [sampler, getattr(sampler, "sampler", None)]
    generators = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    states = [(g, g.get_state()) for g in generators.values()]
    try:
        return list(sampler)
    finally:
        for generator, state in states:
            generator.set_state(state)


def batch_size(batch: Batch) -> int:
    """Count the examples of a batch: the length of the first tensor in it.

    Raises:
        ValueError: If the batch holds no tensor with a batch dimension.

    Example:
        >>> batch_size({"image": torch.zeros(5, 3), "label": torch.zeros(5)})
        5
    """
    for leaf in _leaves(batch):
        if leaf.ndim:
            return len(leaf)
    raise ValueError(f"a batch must hold a tensor with a batch dimension, got {type(batch).__name__}")


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Take examples ``start`` to ``stop`` of a batch: every tensor as long as the batch is cut.

    Example:
        >>> slice_batch((torch.arange(4), "name"), 1, 3)
        (tensor([1, 2]), 'name')
    """
    size = batch_size(batch)
    return map_batch(batch, lambda t: t[start:stop] if t.ndim and len(t) == size else t)


def map_batch(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Apply a function to every tensor of nested lists, tuples and dicts, and keep the rest.

    Example:
        >>> map_batch({"x": [torch.tensor(1)]}, lambda t: t + 1)
        {'x': [tensor(2)]}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return type(batch)((key, map_batch(value, function)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_batch(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_batch(value, function) for value in batch)
    return batch


def _leaves(batch: Batch) -> list[Tensor]:
    leaves: list[Tensor] = []
    map_batch(batch, lambda t: leaves.append(t) or t)  # type: ignore[func-returns-value]
    return leaves
