"""What replicas see: batches in an order of their own, and loaders that end together."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.data import sized_len
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.options import Grid


def own_order(grid: Grid) -> dict[str, Any]:
    """Return a ``DistributedSampler``'s arguments: every replica sees the whole set, in an order of its own."""
    seed = grid.seed(int(os.getenv("PL_GLOBAL_SEED", "0")))
    return {"num_replicas": grid.data_parallel, "rank": grid.position, "seed": seed}


def same_in_replica(grid: Grid, *, own: bool) -> dict[str, Any]:
    """Return a ``DistributedSampler``'s arguments with which all ranks of a replica see the same batches.

    Args:
        grid: where this rank stands.
        own: every replica sees the whole set, in an order of its own; False: an R-th of it.
    """
    if own:
        return own_order(grid) | {"num_replicas": 1, "rank": 0}
    return {"num_replicas": grid.replicas, "rank": grid.replica}


def even_end(loader: object, limit: int | float | None) -> object:
    """Return a training loader that ends at the same batch on every rank. A collective.

    Args:
        loader: this rank's.
        limit: the Trainer's ``limit_train_batches``: at most so many batches an epoch, or a fraction of them.

    Returns:
        The loader itself if all have the same length. Else one that ends when the shortest does: replicas meet at the
        end of an epoch. Where the lengths are known, a warning says how many batches are left out, and nothing is asked
        while training; where one is unknown (an iterable dataset's), the ranks agree before every batch.
    """
    length = sized_len(loader)
    if length is not None and limit is not None:
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
    lengths: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, length)
    if None in lengths:
        return EvenEnd(loader)
    shortest = min(n for n in lengths if n is not None)
    if len(set(lengths)) > 1:
        rank_zero_warn(
            f"training loaders have {lengths} batches by rank: an epoch ends with the shortest, after {shortest}. Give "
            "every rank as much data to see it all"
        )
    return loader if length == shortest else Shortened(loader, shortest)


class _Ending:
    """A loader that ends before another does, whose other attributes can be read here too."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class Shortened(_Ending):
    """A loader that ends after a number of batches.

    Args:
        loader: of more batches.
        length: how many batches.
    """

    def __init__(self, loader: Any, length: int) -> None:
        super().__init__(loader)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._length)


class EvenEnd(_Ending):
    """A loader that ends when the shortest rank's does: before every batch the ranks agree that all have one.

    Args:
        loader: of unknown length.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
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
