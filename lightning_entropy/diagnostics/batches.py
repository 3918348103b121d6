"""Batches to measure on: a fixed choice of examples from a loader that training may be using at this moment."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_entropy.diagnostics.examples import Batch, Layout

# Samplers that only order or shard the dataset; any other one chooses, and its choice is respected.
_ORDERINGS = (SequentialSampler, RandomSampler, DistributedSampler)


def take_batches(
    data: Iterable[Batch], examples: int | None = None, *, layout: Layout | None = None, seed: int = 0
) -> list[Batch]:
    """Take ``examples`` examples from a loader or any iterable of batches, as a list of batches.

    A ``DataLoader`` over a map-style dataset is not iterated: its dataset is read directly, in this process, with
    the loader's collate function and batch size, so that a training loop over the same loader (persistent workers
    included) does not notice. If fewer examples are asked for than there are, a random choice that depends on
    ``seed`` alone is taken, the same at every call. A sampler that leaves examples out is respected; one that
    shards the dataset over ranks is not, nor is sampling with replacement.

    Args:
        data: A ``DataLoader``, a list of batches, or another iterable of batches.
        examples: How many, >= 1. None: all. All of them are kept in memory.
        layout: How examples are counted and cut. None: along the dimension that all tensors share.
        seed: Of the choice.

    Returns:
        Batches; the last may be smaller. Together at most ``examples`` examples.

    Raises:
        ValueError: If ``examples`` is not positive, ``data`` holds no example, or a batch does not say how many it has.

    Example:
        >>> [b.tolist() for b in take_batches([torch.tensor([1, 2]), torch.tensor([3, 4])], 3)]
        [[1, 2], [3]]
    """
    if examples is not None and examples < 1:
        raise ValueError(f"examples must be None or at least 1, got {examples}")
    if isinstance(data, DataLoader):
        data = _quiet_loader(data, examples, seed)
    layout = layout or Layout()
    batches, left = [], examples
    for batch in data:
        size = layout.size(batch)
        if left is not None and size >= left:
            batches.append(batch if size == left else layout.cut(batch, 0, left))
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
