"""The mean over replicas of a list of tensors, in one flat exchange that runs while they train."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.strategies.compression import Format, GroupCollectives, Sum
from lightning_entropy.strategies.options import Grid

# Waits for other ranks inside of the block, at a place with a name; an error then names the rank that is gone.
Meeting = Callable[[str], AbstractContextManager[None]]

DIVERGED = "the weights of every replica are nan or inf"  # how the error begins


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
        self.by_host = dist.get_backend(self.across) == "gloo"
        self.shares = self.inside is not None and not sharded  # each rank exchanges a part of what all of them have
        self.sharded = self.inside is not None and sharded

    def any_inside(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of the flags are set on any rank of this replica. A collective of the replica."""
        if self.inside is None:
            return list(flags)
        agreed = torch.tensor([float(flag) for flag in flags], device="cpu" if self.by_host else "cuda")
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.inside)
        return [value > 0 for value in agreed.tolist()]

    def sum_inside(self, value: Tensor) -> Tensor:
        """Return the sum over the shards of this replica. A collective of it, where it has some."""
        if not self.sharded:
            return value
        total = value.detach().to("cpu" if self.by_host else "cuda", copy=True)
        dist.all_reduce(total, group=self.inside)
        return total.to(value.device)

    def close(self) -> None:
        """Destroy the groups."""
        for group in (self.across, self.inside):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)


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
        meeting: Meeting = lambda where: nullcontext(),
        name: str = "an exchange",
    ) -> None:
        self.links = links
        self.format: Format = format
        self.differences = differences
        self.overlap = overlap
        self.meeting = partial(meeting, name)
        self.round: Round | None = None
        self.notice = False
        self.noticed = False
        self.sent = 0.0
        self.peak = 0.0
        self.waited = 0.0
        self.spread: float | None = None
        self.distance: Tensor | None = None  # this replica's, squared, to be summed with the next round
        self.memory = Memory()
        self._before = Memory()

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
        finite: whether its weights are, so that they count.
    """

    def __init__(self, coupling: Coupling, tensors: list[Tensor], judged: int) -> None:
        self.tensors = tensors
        self._coupling, self._judged = coupling, tensors[:judged]
        self._means: list[Tensor] | None = None
        # How many values are judged together: those of all weights, then those of every other tensor.
        self._sizes = [sum(t.numel() for t in self._judged), *(t.numel() for t in tensors[judged:])]
        flat = flatten(tensors)
        self._device = flat.device
        with coupling.meeting():
            counts, notice = self._agree_inside(flat)
        self.finite = counts[0] > 0
        for part, counted in zip(flat.split(self._sizes), counts, strict=True):
            if not counted:
                part.zero_()
        own = self._part(flat)
        memory = coupling.memory
        if memory.mean is not None and memory.mean.numel() != own.numel():
            memory = Memory()  # parameters have been added: start afresh
        self._compressed = coupling.format != "float32"
        assert len(counts) == 1 or not self._compressed, "a compressed round has weights alone"
        self._reference = memory.mean.to(own) if coupling.differences and memory.mean is not None else None
        whole = self._compressed and coupling.differences and self._reference is None
        values = own if self._reference is None else own - self._reference
        if memory.residual is not None:
            values = values + memory.residual.to(own)
        if not self.finite and len(counts) == 1:  # nor what the rounds before have left over
            values = torch.zeros_like(own)
        distance = torch.zeros((), device=own.device)
        if self.finite and coupling.distance is not None:
            distance = coupling.distance.to(own.device, torch.float32)
        self._header = torch.cat([torch.tensor([*counts, notice], device=own.device), distance.reshape(1)])
        with coupling.meeting():
            self._header_work = dist.all_reduce(self._header, group=coupling.links.across, async_op=True)
            across = GroupCollectives(coupling.links.across)
            self._sum = Sum(values, across, "float32" if whole else coupling.format, memory.share)
        self._residual = values - self._sum.sent if self._compressed and self.finite else memory.residual
        sent = 2 * (1 - 1 / coupling.links.replicas) * (self._sum.payload + 4 * self._header.numel())
        coupling.sent, coupling.peak = coupling.sent + sent, max(coupling.peak, sent)

    def _agree_inside(self, flat: Tensor) -> tuple[list[float], float]:
        """Return what the replica's ranks decide together: whether each part counts, and whether they give notice."""
        lost = self._coupling.links.any_inside([*(not f for f in finite(flat, self._sizes)), self._coupling.notice])
        return [0.0 if flag else 1.0 for flag in lost[:-1]], float(lost[-1])

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
        mean = total / counts[0] if len(counts) == 1 else total / self._part(self._spread_out(counts, total))
        if self._reference is not None:
            mean = self._reference + mean
        if self._compressed:
            coupling.memory = Memory(mean if coupling.differences else None, self._residual, self._sum.residual)
        whole = self._whole(mean).to(self._device)
        means = unflatten(whole, self.tensors)
        coupling.spread = None if coupling.distance is None else (squares / counts[0]) ** 0.5
        if self._judged and self.finite:
            total, count = squared_distance(self._judged, whole), self._sizes[0]
            coupling.distance = coupling.links.sum_inside(total) / coupling.links.sum_inside(torch.tensor(float(count)))
        return means

    def _spread_out(self, counts: list[float], like: Tensor) -> Tensor:
        """Return for every value of all the tensors by how many replicas it was counted."""
        sizes, number = torch.tensor(self._sizes, device=like.device), sum(self._sizes)
        return torch.tensor(counts, dtype=like.dtype, device=like.device).repeat_interleave(sizes, output_size=number)

    def _part(self, flat: Tensor) -> Tensor:
        """Return this rank's part of its replica's values, on the device they are sent from."""
        links = self._coupling.links
        offloaded = flat.device.type == "cpu"  # unless the replicas are on the CPU
        device = "cpu" if links.by_host else "cuda" if offloaded else flat.device
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


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of all tensors, copied into one on the first one's device: float64 if any is, else float32."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=wide, device=tensors[0].device if tensors else None)
    pieces = [piece.view(t.shape) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    # Apart: one tensor in another order in memory, and a list of copies is made one by one on a GPU.
    for contiguous in (True, False):
        some = [i for i, t in enumerate(tensors) if t.is_contiguous() is contiguous]
        F.copy_([pieces[i] for i in some], [tensors[i].detach() for i in some])
    return flat


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of a flat tensor in the shapes and on the devices of others; views of it where it is there."""
    sizes = [t.numel() for t in like]
    pieces = {device: flat.to(device).split(sizes) for device in {t.device for t in like}}
    return [pieces[t.device][i].view(t.shape) for i, t in enumerate(like)]


def finite(flat: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Return of each part whether all its values are finite; a device is waited for once, whatever their number.

    Args:
        flat: values, in one dimension.
        sizes: of the parts, the first by far the largest.

    Example:
        >>> finite(torch.tensor([1.0, 2.0, torch.nan, 3.0]), [2, 1, 0, 1])
        [True, False, True, True]
    """
    good = flat.isfinite()
    first = good[: sizes[0]].all().reshape(1)
    if len(sizes) == 1:
        return first.tolist()
    # A part's values are all good if as many of them are counted as there are.
    counts = good[sizes[0] :].cumsum(0, dtype=torch.int32)
    ends = torch.tensor([0, *sizes[1:]]).cumsum(0).to(flat.device)
    upto = torch.cat([counts.new_zeros(1), counts])[ends]
    return torch.cat([first, upto.diff() == ends.diff()]).tolist()


def squared_distance(tensors: Sequence[Tensor], means: Tensor) -> Tensor:
    """Return the sum of squares of tensors less their means, which begin flat values on their device."""
    difference = flatten(tensors)
    return difference.sub_(means[: difference.numel()]).square_().sum()
