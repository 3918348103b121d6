"""The process groups of replicas."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies.options import Grid


class Links:
    """The process groups of one stream of exchanges, this rank's row and column of the replicas x data-parallel grid.

    No other stream uses them, so that an exchange in progress cannot mix with another collective. Opening them is a
    collective of the whole world.

    Args:
        replicas: R, rows of the grid; rank = replica * D + position.
        data_parallel: D, ranks of one replica.
        timeout: after which waiting for a rank that does not answer is an error.
        sharded: the ranks of a replica have different weights, each its shards, rather than the same.
    """

    def __init__(
        self, replicas: int, data_parallel: int, timeout: timedelta | None = None, *, sharded: bool = False
    ) -> None:
        rows = [[r * data_parallel + d for d in range(data_parallel)] for r in range(replicas)]
        self.across = own_group([list(column) for column in zip(*rows, strict=True)], timeout)
        self.inside = own_group(rows, timeout) if data_parallel > 1 else None
        self.replicas, self.data_parallel = replicas, data_parallel
        self.position = dist.get_rank() % data_parallel
        self.by_host = dist.get_backend(self.across) == "gloo"  # the host's threads send, and know when it is done
        self.shares = self.inside is not None and not sharded  # each rank exchanges a part of what all of them have
        self.sharded = self.inside is not None and sharded

    def any_inside(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of the flags are set on any rank of this replica. A collective of the replica."""
        if self.inside is None:
            return list(flags)
        agreed = torch.tensor([float(flag) for flag in flags], device="cpu" if self.by_host else "cuda")
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.inside)
        return [value > 0 for value in agreed.tolist()]

    def device_of(self, values: Tensor) -> torch.device:
        """Return where values are sent from: where they are, if the groups take them there."""
        taken = ("cpu", "cuda") if self.by_host else ("cuda",)
        if values.device.type in taken:
            return values.device
        return torch.device("cpu" if self.by_host else "cuda")  # values that are offloaded to the host, say

    def sum_inside(self, value: Tensor) -> Tensor:
        """Return the sum over the shards of this replica. A collective of it, where it has some."""
        if not self.sharded:
            return value
        total = value.detach().to(self.device_of(value), copy=True)
        dist.all_reduce(total, group=self.inside)
        return total.to(value.device)

    def close(self) -> None:
        """Destroy the groups."""
        for group in (self.across, self.inside):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)


def data_parallel_group(grid: Grid) -> dist.ProcessGroup | None:
    """Open a process group for each replica's ranks and return this rank's; None if a replica is one rank."""
    rows = [[r * grid.data_parallel + d for d in range(grid.data_parallel)] for r in range(grid.replicas)]
    return own_group(rows, None) if grid.data_parallel > 1 else None


def own_group(groups: list[list[int]], timeout: timedelta | None) -> Any:
    """Open all the groups and return the one this rank is in."""
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    return mine
