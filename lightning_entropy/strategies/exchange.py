"""The mean over replicas of a list of tensors, in one flat exchange that runs while they train.

On a GPU the host waits for nothing when one begins, where a replica is one rank. The device finds what is not finite,
and takes it out. NCCL has a stream of its own, and what is between the halves of a rounded exchange another. For gloo
torch copies CUDA's tensors to pinned memory and back, on streams of its own, and a thread of gloo waits for the copy,
and then for the others. So the collectives of a process group are called in the same order on all ranks, at the same
places in the program, whenever their devices get there. (Copies of our own, whose collectives the next step starts that
finds them made, would be more code and begin later.)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies.compression import Codec, EagerCodec, Entry, Format
from lightning_entropy.strategies.flattened import (
    finite,
    flatten,
    numbers_on,
    spread_out,
    squared_distance,
    unflatten,
)
from lightning_entropy.strategies.fused import FusedCodec, is_fusible
from lightning_entropy.strategies.links import Links
from lightning_entropy.strategies.summation import GroupCollectives, Sum
from lightning_entropy.trainer.metrics import to_host

# Waits for other ranks inside of the block, at a place with a name; an error then names the rank that is gone.
Meeting = Callable[[str], AbstractContextManager[None]]

NO_DISTANCE = (1.0, 0.0, 0.0)  # the header of a replica that has none yet: see Coupling.distance
DIVERGED = "the weights of every replica are nan or inf"  # how the error begins


@dataclass(frozen=True)
class Memory:
    """The state of a compressed stream between two rounds. Its tensors are replaced, never written to.

    Attributes:
        mean: the last mean; None before the first.
        residual: the rounding error of this replica's values.
        share: the rounding error of this rank's share of the sum.
    """

    mean: Tensor | None = None
    residual: Tensor | None = None
    share: Tensor | None = None


class Coupling:
    """Means over replicas, one exchange after the other: the engine's ``replica_mean``.

    What is not finite enters no mean: a replica sends zeros of weight zero in its place, and the mean is that of the
    others. The weights are judged together, any further tensor (a buffer) by itself. If a replica has several ranks,
    they judge together too; each exchanges its part of the weights and they gather the parts, so that the replica's
    ranks get the same bits and the replica sends its weights once.

    A round also carries a notice: whether any rank wants something that all have to do together (to stop, say). All
    ranks know it when they have waited for the same round.

    Args:
        links: process groups of its own.
        format: of what is sent. Formats below float32 send the difference from the last mean, which all replicas have,
            and add the rounding error to the next round (error feedback); the first round is sent in float32.
        differences: False sends the values themselves: for pseudo-gradients, which the last mean does not predict.
        overlap: False waits for every exchange at once, with the same result.
        compile: on a GPU float32 values are rounded by kernels of our own.
        meeting: waits for other ranks.
        name: of the stream, for messages.

    Attributes:
        round: the last exchange; None before the first.
        notice: whether this rank gives notice in the rounds that it starts from now on.
        noticed: whether any rank has given notice, in the rounds that have been waited for.
        sent: bytes this rank has sent to other replicas, counted as for a ring: 2 (R - 1) / R of the payload.
        peak: the largest number of bytes that it has sent in one exchange.
        waited: seconds this rank has waited for exchanges to end.
        spread: rms per weight, over replicas, of their distance to the mean in the previous round; None before that.
    """

    def __init__(
        self,
        links: Links,
        *,
        format: Format = "float32",
        differences: bool = True,
        overlap: bool = True,
        compile: bool = False,
        meeting: Meeting = lambda where: nullcontext(),
        name: str = "an exchange",
    ) -> None:
        self.links = links
        self.format: Format = format
        self.differences = differences
        self.overlap = overlap
        self.compile = compile
        self.meeting = partial(meeting, name)
        self.round: Round | None = None
        self.notice = False
        self.noticed = False
        self.sent = 0.0
        self.peak = 0.0
        self.waited = 0.0
        self.spread: float | None = None
        # The next round's header, if this replica is finite then: that it is, no notice, and its squared distance.
        self.distance: Tensor | None = None
        self.memory = Memory()
        self._before = Memory()
        self._aside: torch.cuda.Stream | None = None

    def __call__(self, tensors: Sequence[Tensor], judged: int | None = None) -> Callable[[], list[Tensor]]:
        """Start a mean over replicas.

        Args:
            tensors: any shapes, the same on all replicas. They must not change until the mean has been waited for.
            judged: how many of them, from the first, are the weights; None: all.

        Returns:
            A function that waits for the means and returns them, in float64 if any tensor is, else in float32. The mean
            of a tensor beyond the weights that is finite on no replica is nan.

        Raises:
            RuntimeError: a rank is gone.
        """
        self._before = self.memory
        self.round = Round(self, list(tensors), len(tensors) if judged is None else judged)
        if not self.overlap:
            self.round.wait()
        return self.round.wait

    def progress(self) -> None:
        """Start the second half of the exchange, if it has one and the first has arrived."""
        if self.round is not None and self.links.by_host:
            self.round.progress()

    def aside(self, device: torch.device) -> torch.cuda.Stream | None:
        """Return the stream for what follows the first half of an exchange; None where the host's threads send."""
        if self._aside is None and not self.links.by_host:
            self._aside = torch.cuda.Stream(device)
        return self._aside

    def state_dict(self, *, repeat: bool) -> dict[str, Tensor | None]:
        """Return the memory.

        Args:
            repeat: a round under way is started again after loading, so the memory is the one before it.
        """
        return dict(vars(self._before if repeat and self.round is not None else self.memory))

    def covers(self, size: int) -> bool:
        """Whether the memory, if there is any, is of all of that many numbers of this rank, and no share of them."""
        tensors = [t for m in (self.memory, self._before) for t in (m.mean, m.residual) if t is not None]
        return not self.links.shares and all(t.numel() == size for t in tensors)

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Restore the memory that :meth:`state_dict` returned."""
        self.memory = Memory(**state)


class Round:
    """One exchange.

    Attributes:
        tensors: this replica's.
    """

    def __init__(self, coupling: Coupling, tensors: list[Tensor], judged: int) -> None:
        self.tensors = tensors
        self._coupling, self._judged = coupling, tensors[:judged]
        self._means: list[Tensor] | None = None
        # How many values are judged together: those of all weights, then those of every other tensor.
        self._sizes = [sum(t.numel() for t in self._judged), *(t.numel() for t in tensors[judged:])]
        flat = flatten(tensors)
        self._device, self._dtype = flat.device, flat.dtype
        good, notice = finite(flat, self._sizes), coupling.notice
        if coupling.links.inside is not None:
            with coupling.meeting():
                good, notice = self._agree_inside(good)
        lost = good.logical_not()
        # The ranks of a replica go back to the mean together, so all of them know it now.
        self._left_out, self._event = to_host(lost[:1]) if coupling.links.inside is None else (lost[:1].cpu(), None)
        own = self._part(flat)
        lost = lost.to(own.device, non_blocking=True)
        memory = coupling.memory
        if memory.mean is not None and memory.mean.numel() != own.numel():
            memory = Memory()  # parameters have been added: start afresh
        self._compressed = coupling.format != "float32"
        assert len(self._sizes) == 1 or not self._compressed, "a compressed round has weights alone"
        self._reference = memory.mean.to(own) if coupling.differences and memory.mean is not None else None
        whole = coupling.differences and self._reference is None
        # A replica that does not count does not send what the rounds before have left over either.
        entry = Entry(
            self._reference,
            None if memory.residual is None else memory.residual.to(own),
            lost if len(lost) == 1 else self._part(spread_out(lost, self._sizes)),
        )
        self._header = self._described(good.to(own.device, non_blocking=True), lost, notice=notice)
        with coupling.meeting():
            self._header_work = dist.all_reduce(self._header, group=coupling.links.across, async_op=True)
            across = GroupCollectives(coupling.links.across)
            codec = None if whole else self._codec(own)
            aside = None if codec is None else coupling.aside(own.device)
            self._sum = Sum(own, across, codec, memory.share, entry, aside)
        self._residual = self._after_rounding(own, entry) if self._compressed else None
        sent = 2 * (1 - 1 / coupling.links.replicas) * (self._sum.payload + 4 * self._header.numel())
        coupling.sent, coupling.peak = coupling.sent + sent, max(coupling.peak, sent)

    @property
    def finite(self) -> bool | None:
        """Whether this replica's weights are, so that they count; None where a device is yet to find out."""
        if self._event is not None and self._means is None and not self._event.query():
            return None
        return not self._left_out

    def _agree_inside(self, good: Tensor) -> tuple[Tensor, bool]:
        """Return what the replica's ranks decide together: whether each part counts, and whether they give notice."""
        flags = [*(not flag for flag in good.tolist()), self._coupling.notice]
        *lost, notice = self._coupling.links.any_inside(flags)
        return torch.tensor([not flag for flag in lost], device=good.device), notice

    def _described(self, good: Tensor, lost: Tensor, *, notice: bool) -> Tensor:
        """Return what is summed beside the values: whether each part counts, the notice, and the squared distance."""
        known, device = self._coupling.distance, lost.device
        header = numbers_on(device, NO_DISTANCE) if known is None else known.to(device, non_blocking=True)
        if len(lost) == 1:
            header = header.masked_fill(lost, 0.0)
        else:
            header = torch.cat([good, header[1:].masked_fill(lost[:1], 0.0)])
        if notice:
            header[-2].fill_(1.0)
        return header

    def _codec(self, values: Tensor) -> Codec | None:
        """Return how values are rounded."""
        if not self._compressed:
            return None
        fused = self._coupling.compile and is_fusible(values)
        return (FusedCodec if fused else EagerCodec)(self._coupling.format)

    def _after_rounding(self, values: Tensor, entry: Entry) -> Tensor:
        """Return what the next round is to add: what this one leaves out, or the one before if this does not count."""
        if self._sum.left is not None:
            return self._sum.left
        left = torch.zeros_like(values)
        return left if entry.before is None or entry.lost is None else torch.where(entry.lost, entry.before, left)

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` returns at once, without a collective."""
        if self._means is not None:
            return True
        return self._coupling.links.inside is None and self._header_work.is_completed() and self._sum.done

    def advance(self) -> None:
        """Start the second half, if there is one, as soon as the first has arrived, which is waited for.

        To be called before a collective in which the other replicas may already wait for this one.
        """
        if self._means is None:
            with self._coupling.meeting():
                self._sum.advance()

    def progress(self) -> None:
        """Start the second half, if there is one and the first has arrived."""
        if self._means is None:
            with self._coupling.meeting():
                self._sum.progress()

    def wait(self) -> list[Tensor]:
        """Wait for the means and return them; may be called again.

        Raises:
            RuntimeError: a rank is gone, or no replica has finite values.
        """
        if self._means is None:
            start = time.perf_counter()
            with self._coupling.meeting():
                self._means = self._wait()
            self._coupling.waited += time.perf_counter() - start
        return self._means

    def _wait(self) -> list[Tensor]:
        coupling = self._coupling
        total = self._sum.result()
        self._header_work.wait()
        *counts, noticed, squares = self._header.tolist()
        coupling.noticed = coupling.noticed or noticed > 0
        if counts[0] == 0:
            raise RuntimeError(f"{DIVERGED}: lower the learning rate, or gamma and rho")
        known = self._header[: len(counts)]
        count = known[0] if len(counts) == 1 else self._part(spread_out(known.to(total.dtype), self._sizes))
        if self._reference is None:
            mean = total.to(self._dtype) / count
        else:
            mean = torch.addcdiv(self._reference, total, count)
        if self._compressed:
            coupling.memory = Memory(mean if coupling.differences else None, self._residual, self._sum.residual)
        whole = self._whole(mean).to(self._device)
        means = unflatten(whole, self.tensors)
        coupling.spread = None if coupling.distance is None else (squares / counts[0]) ** 0.5
        if self._judged and not self._left_out:
            self._measure(whole)
        return means

    def _measure(self, means: Tensor) -> None:
        """Keep this replica's squared distance to the means, per weight, for the next round."""
        coupling, total = self._coupling, squared_distance(self._judged, means)
        count: Any = self._sizes[0]
        if coupling.links.sharded:
            count = coupling.links.sum_inside(torch.tensor(float(count)))
        if coupling.distance is None:
            coupling.distance = numbers_on(total.device, NO_DISTANCE)
        torch.div(coupling.links.sum_inside(total), count, out=coupling.distance[2])

    def _part(self, flat: Tensor) -> Tensor:
        """Return this rank's part of its replica's values, on the device they are sent from."""
        links = self._coupling.links
        device = links.device_of(flat)
        if not links.shares:
            return flat.to(device)
        size = -(-flat.numel() // links.data_parallel)
        padded = torch.nn.functional.pad(flat, (0, size * links.data_parallel - flat.numel()))
        return padded[links.position * size : (links.position + 1) * size].to(device)

    def _whole(self, part: Tensor) -> Tensor:
        """Gather the parts of the replica's ranks."""
        links = self._coupling.links
        if not links.shares:
            return part
        parts = [torch.empty_like(part) for _ in range(links.data_parallel)]
        dist.all_gather(parts, part, group=links.inside)
        return torch.cat(parts)[: sum(t.numel() for t in self.tensors)]
