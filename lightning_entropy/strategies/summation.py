"""How a flat tensor is summed over replicas: as it is, or in two halves with fewer bits."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies.compression import Codec, Entry, share_size


class Collectives(Protocol):
    """What a sum asks of a group of processes. Each returns the work in progress, as torch.distributed does."""

    @property
    def size(self) -> int:
        """How many processes."""
        ...

    def all_reduce(self, values: Tensor) -> Any:
        """Sum in place."""
        ...

    def all_to_all(self, received: Tensor, given: Tensor) -> Any:
        """Exchange rows: of ``given`` one for each process, of ``received`` one from each."""
        ...

    def all_gather(self, received: list[Tensor], given: Tensor) -> Any:
        """Receive what every process gives."""
        ...


class GroupCollectives:
    """:class:`Collectives` of a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """How many processes."""
        return dist.get_world_size(self._group)

    def all_reduce(self, values: Tensor) -> Any:
        """Sum in place."""
        return dist.all_reduce(values, group=self._group, async_op=True)

    def all_to_all(self, received: Tensor, given: Tensor) -> Any:
        """Exchange rows."""
        return dist.all_to_all_single(received, given, group=self._group, async_op=True)

    def all_gather(self, received: list[Tensor], given: Tensor) -> Any:
        """Receive what every process gives."""
        return dist.all_gather(received, given, group=self._group, async_op=True)


class Sum:
    """One sum over a group of processes, in progress.

    Without a codec the values are sent as they are, in one all-reduce. With one, bytes are sent in two halves: every
    rank receives the others' values of its share and sums them in float32, and then sends the rounded sum to all.

    Args:
        values: what this rank adds, flat. They are overwritten.
        group: over which.
        codec: how they are rounded; None: not at all.
        residual: the rounding error of this rank's share of the last sum, added to this one; None: nothing.
        entry: what is done with the values first.
        aside: a stream on which the second half begins by itself when the first has arrived, where a group's work is
            waited for by streams (NCCL's) and not by the host; None: :meth:`progress` or :meth:`advance` begins it.

    Attributes:
        left: what this rank is to add to its next values; None where rounding leaves out nothing.
        payload: bytes of the values as they are sent.
        residual: for the next sum.
    """

    def __init__(
        self,
        values: Tensor,
        group: Collectives,
        codec: Codec | None,
        residual: Tensor | None,
        entry: Entry = Entry(),  # noqa: B008 - immutable
        aside: torch.cuda.Stream | None = None,
    ) -> None:
        self._group, self._codec, self._size, self._aside = group, codec, values.numel(), aside
        self.residual = residual
        self.left: Tensor | None = None
        self._second: Tensor | None = None
        if codec is None:
            self._given = entry.apply_(values)
            self._work = group.all_reduce(self._given)
        else:
            self._share = share_size(self._size, group.size)
            self._given, self.left = codec.enter(values, entry, group.size, self._share)
            self._first = torch.empty_like(self._given)
            self._work = group.all_to_all(self._first, self._given)
        self.payload = self._given.numel() * self._given.element_size()
        if aside is not None and self.in_halves:
            self._start_aside(aside)

    @property
    def in_halves(self) -> bool:
        """Whether a second half follows the first."""
        return self._codec is not None

    @property
    def done(self) -> bool:
        """Whether :meth:`result` would return at once, without a collective."""
        return (not self.in_halves or self._second is not None) and self._work.is_completed()

    def progress(self) -> None:
        """Start the second half if the first has arrived."""
        if self.in_halves and self._second is None and self._work.is_completed():
            self._start_second()

    def advance(self) -> None:
        """Wait for the first half, if there are two, and start the second."""
        if self.in_halves and self._second is None:
            self._start_second()

    def result(self) -> Tensor:
        """Wait for the sum and return it, flat; rounded to bfloat16 it is of that type.

        Raises:
            RuntimeError: a rank of the group is gone.
        """
        self.advance()
        self._work.wait()
        if self._codec is None:
            return self._given
        assert self._second is not None
        if self._aside is not None:  # it is of that stream's memory
            self._second.record_stream(torch.cuda.current_stream(self._second.device))
        return self._codec.leave(self._second, self._share)[: self._size]

    def _start_aside(self, stream: torch.cuda.Stream) -> None:
        """Start the second half on a stream of its own, which waits for the first; neither host nor training does.

        The memory of the first half is the current stream's, which must not use it again before that stream is done.
        That stream's own is used again when it has waited for the current one, in the next exchange.
        """
        for t in (self._given, self._first):
            t.record_stream(stream)
        stream.wait_stream(torch.cuda.current_stream(self._first.device))
        with torch.cuda.stream(stream):
            self._start_second()

    def _start_second(self) -> None:
        assert self._codec is not None
        self._work.wait()
        self._given, self.residual = self._codec.pass_on(self._first, self._share, self.residual)
        self._second = torch.empty_like(self._first)
        pieces = [piece.view(1, -1) for piece in self._second.unbind()]
        self._work = self._group.all_gather(pieces, self._given)
