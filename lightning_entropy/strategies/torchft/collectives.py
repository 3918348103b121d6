"""The collectives of the replicas that meet, as a sum asks for them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions


class MeetingCollectives:
    """:class:`~lightning_entropy.strategies.summation.Collectives` of a process group of torchft.

    Args:
        group: of those that meet.
        size: how many they are.
        limit: after which one that is alive and silent is a failure.
        finish: waits for a collective.
    """

    def __init__(self, group: Any, size: int, limit: timedelta, finish: Callable[[Any], None]) -> None:
        self.size = size
        self._group, self._limit, self._finish = group, limit, finish

    def all_reduce(self, values: Tensor) -> "Awaited":
        """Sum in place."""
        return self._in_progress(AllreduceOptions(), lambda options: self._group.allreduce([values], options))

    def all_to_all(self, received: Tensor, given: Tensor) -> "Awaited":
        """Exchange rows."""
        return self._in_progress(
            AllToAllOptions(), lambda options: self._group.alltoall_base(received, given, [], [], options)
        )

    def all_gather(self, received: list[Tensor], given: Tensor) -> "Awaited":
        """Receive what every process gives."""
        return self._in_progress(
            AllgatherOptions(), lambda options: self._group.allgather([received], [given], options)
        )

    def _in_progress(self, options: Any, start: Callable[[Any], Any]) -> "Awaited":
        options.timeout = self._limit
        return Awaited(start(options), self._finish)


class Awaited:
    """A collective in progress.

    Args:
        work: the collective.
        finish: waits for it.
    """

    def __init__(self, work: Any, finish: Callable[[Any], None]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        """Wait until it is done."""
        self._finish(self._work)
