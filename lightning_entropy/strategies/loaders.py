"""What replicas see: batches in an order of their own, and loaders that end together."""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.data import sized_len
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_entropy.strategies.options import Grid


def own_order(grid: Grid) -> dict[str, Any]:
    """Return a ``DistributedSampler``'s arguments: every replica sees the whole set, in an order of its own."""
    seed = grid.seed(int(os.getenv("PL_GLOBAL_SEED", "0")))
    return {"num_replicas": grid.data_parallel, "rank": grid.position, "seed": seed}


def even_end(loader: object, limit: int | float | None) -> object:
    """Return a training loader that ends at the same batch on every rank. A collective.

    Args:
        loader: this rank's.
        limit: the Trainer's ``limit_train_batches``: at most so many batches an epoch, or a fraction of them.

    Returns:
        The loader itself if the length is known on all ranks, else one that ends when the shortest does.

    Raises:
        MisconfigurationException: the lengths are known and differ; all ranks raise it.
    """
    length = sized_len(loader)
    if length is not None and limit is not None:
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
    lengths: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, length)
    if None in lengths:
        return EvenEnd(loader)
    if len(set(lengths)) > 1:
        raise MisconfigurationException(
            f"training loaders must have as many batches on every rank, got {lengths} by rank: set limit_train_batches "
            f"to {min(n for n in lengths if n is not None)}, or give every rank as much data"
        )
    return loader


class EvenEnd:
    """A loader that ends when the shortest rank's does: before every batch the ranks agree that all have one.

    Args:
        loader: of unknown length. Its other attributes can be read here too.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._group: Any = dist.new_group(backend="gloo")

    def __iter__(self) -> Iterator[Any]:
        end = object()
        batches = iter(self._loader)
        while True:
            batch = next(batches, end)
            all_have = torch.tensor(int(batch is not end))
            dist.all_reduce(all_have, dist.ReduceOp.MIN, group=self._group)
            if not all_have:
                return
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)
