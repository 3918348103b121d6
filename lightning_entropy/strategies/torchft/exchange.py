"""The mean over the replicas that are there: the engine's ``replica_mean`` where replicas come and go."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.exchange import DIVERGED
from lightning_entropy.strategies.flattened import finite, flatten, spread_out, squared_distance, unflatten
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.records import Met
from lightning_entropy.strategies.torchft.rounding import ALONE, NEW, Left, Rounding
from lightning_entropy.trainer.metrics import to_host


class ElasticCoupling:
    """Means over the replicas that meet, one exchange after the other.

    It has the interface of :class:`Coupling`. What is not finite enters no mean: weights are judged together, and every
    further tensor (a buffer) by itself. Where a peer is lost in the middle of an exchange there is no mean, and the
    next exchange is of those that are left.

    Args:
        assembly: where the replicas meet.
        stream: the number of this stream of exchanges, the same on all replicas.
        format: of the weights that are sent; the same on all replicas. The rounding error is added to the next mean.
        differences: in formats below float32, those from the last mean are sent, where all have the same.
        overlap: False waits for every exchange at once, with the same result.
        keep: the last means are kept, of tensors that the engine does not ask for again.
        extras: returns further tensors, whose means travel with those that the engine asks for.
        common: all replicas take the same step along the mean, so that one that has missed it is behind: returns what
            they have in common. None: they do not.
        catch_up: takes over what ``common`` has returned on another replica.

    Attributes:
        round: the last exchange; None before the first.
        passes: the next exchange is left out: this replica has joined at the mean that it would bring.
        version: how many common steps have been taken; -1 without any.
        last: the last means that have arrived, if they are kept; empty before.
        last_extras: those of the further tensors; nan where no replica's was finite.
        sent: bytes this replica has sent, counted as for a ring: 2 (R - 1) / R of the payload.
        peak: the largest number of bytes that it has sent in one exchange.
        waited: seconds it has waited for exchanges to end.
        spread: rms per weight, over replicas, of their distance to the mean in the previous round; None before that.
    """

    def __init__(
        self,
        assembly: Assembly | Delegation,
        stream: int,
        *,
        format: Format = "float32",
        differences: bool = True,
        overlap: bool = True,
        keep: bool = False,
        extras: Callable[[], list[Tensor]] = list,
        common: Callable[[], dict[str, Any]] | None = None,
        catch_up: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.assembly, self.stream, self.overlap, self.keep = assembly, stream, overlap, keep
        self.extras, self.common, self.catch_up = extras, common, catch_up
        self.format: Format = format
        self.differences = differences
        self.last_mean: tuple[int, Tensor | None] = (NEW if differences else ALONE, None)  # by its key
        self.left: Left | None = None  # by the rounding of the last exchange
        self.version = -1 if common is None else 0
        self.passes = False
        self.round: ElasticRound | None = None
        self.last: list[Tensor] = []
        self.last_extras: list[Tensor] = []
        self.sent = 0.0
        self.peak = 0.0
        self.waited = 0.0
        self.spread: float | None = None
        self.distance: Tensor | None = None  # this replica's, squared, to be summed with the next round

    def __call__(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor] | None]:
        """Start a mean over the replicas that meet.

        Args:
            tensors: any shapes, the same on all replicas. They must not change until the mean has been waited for.

        Returns:
            A function that waits for the means and returns them, in float64 if any tensor is, else in float32; None if
            a peer was lost, and there is no mean.
        """
        if self.passes:
            self.passes = False
            return lambda: None
        self.round = ElasticRound(self, list(tensors))
        if not self.overlap:
            self.round.wait()
        return self.round.wait

    def progress(self) -> None:
        """Do nothing: an exchange advances by itself."""

    def state_dict(self, *, repeat: bool) -> dict[str, Any]:
        """Return the number of common steps, and whether the exchange of the loop has begun.

        Where the last of these steps has its mean, and is yet to be taken, the mean is with it.
        """
        counted = self.version >= 0 and self.round is not None
        return {
            "version": self.version,
            "begun": self.passes or self.round is not None,
            "under_way": self.round.means if counted and self.round is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.version = state["version"]


class ElasticRound:
    """One exchange.

    Attributes:
        tensors: this replica's.
        means: that have been waited for; None: not yet, or there are none.
    """

    def __init__(self, coupling: ElasticCoupling, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._coupling, self._waited = coupling, False
        self.means: list[Tensor] | None = None
        self._extras = [extra.detach() for extra in coupling.extras()]
        flat = flatten([*tensors, *self._extras])
        self._sizes = [sum(t.numel() for t in tensors), *(extra.numel() for extra in self._extras)]
        self._device = flat.device
        lost = finite(flat, self._sizes).logical_not()
        if coupling.assembly.single:
            self._left_out, self._event = to_host(lost[:1])
        else:  # the ranks of a replica go back to the mean together, so all of them know it now
            flags = torch.tensor(coupling.assembly.agree(lost.tolist()))
            lost, self._left_out, self._event = flags.to(flat.device), flags[:1], None
        flat[: self._sizes[0]].masked_fill_(lost[:1], 0.0)
        if self._extras:
            flat[self._sizes[0] :].masked_fill_(spread_out(lost[1:], self._sizes[1:]), 0.0)
        payload, ready, rounding = None, None, self._rounding() if coupling.format != "float32" else None
        if coupling.assembly.speaks:
            distance = flat.new_zeros(1) if coupling.distance is None else coupling.distance.reshape(1)
            parts = flat, lost.logical_not(), distance.masked_fill(lost[:1], 0.0)
            payload, ready = to_host(torch.cat([part.to(flat.dtype) for part in parts]))
        # Looked up now: it stays as it is until the mean is used, and what is around it may train meanwhile.
        common = None if coupling.common is None else partial(dict[str, Any], coupling.common())
        self._encounter = coupling.assembly.exchange(
            payload,
            ready=ready,
            stream=coupling.stream,
            version=coupling.version,
            common=common,
            rounding=rounding,
        )

    @property
    def finite(self) -> bool | None:
        """Whether this replica's weights are, so that they count; None where a device is yet to find out."""
        if self._event is not None and not self._event.query():
            return None
        return not self._left_out

    def _rounding(self) -> Rounding:
        coupling, size = self._coupling, self._sizes[0]
        key, mean = coupling.last_mean
        residual = None if coupling.left is None else coupling.left.residual
        if any(t is not None and t.numel() != size for t in (mean, residual)):  # parameters have been added
            coupling.last_mean, coupling.left = (NEW if coupling.differences else ALONE, None), None
            key, mean = coupling.last_mean
        return Rounding(coupling.format, size, key, mean, coupling.left, self._left_out)

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self._waited or self._encounter.arrived

    def wait(self) -> list[Tensor] | None:
        """Wait for the means and return them; None if there are none. May be called again.

        Raises:
            RuntimeError: no replica has finite values.
            ValueError: this replica trains another model than most.
        """
        if not self._waited:
            start = time.perf_counter()
            met = self._encounter.wait()
            self._coupling.waited += time.perf_counter() - start
            self._waited = True
            if met is not None and met.total is not None:
                if met.common is not None:
                    self._take_over(met.common)
                self.means = self._mean(met, met.total)
        return self.means

    def _take_over(self, common: dict[str, Any]) -> None:
        coupling = self._coupling
        assert coupling.catch_up is not None
        coupling.catch_up(common)
        coupling.version = common["version"]

    def _mean(self, met: Met, total: Tensor) -> list[Tensor]:
        coupling = self._coupling
        if coupling.assembly.speaks:
            sent = 2 * (1 - 1 / len(met.records)) * met.bytes
            coupling.sent, coupling.peak = coupling.sent + sent, max(coupling.peak, sent)
        values, counts, squares = total.split([sum(self._sizes), len(self._sizes), 1])
        if counts[0] == 0:
            raise RuntimeError(f"{DIVERGED}: lower the learning rate, or gamma and rho")
        if coupling.version >= 0:
            coupling.version += 1
        scale = counts.repeat_interleave(torch.tensor(self._sizes))
        mean = values / scale  # 0 / 0 is nan: of no replica
        if coupling.format != "float32":
            first = mean[: self._sizes[0]]
            if not met.whole and coupling.last_mean[1] is not None:
                first += coupling.last_mean[1]
            coupling.left = met.left
            if coupling.differences:
                coupling.last_mean = met.key, first.clone()
        means = unflatten(mean, [*self.tensors, *self._extras])
        means, coupling.last_extras = means[: len(self.tensors)], means[len(self.tensors) :]
        if coupling.keep:
            coupling.last = means
        coupling.spread = None if coupling.distance is None else float(squares / counts[0]) ** 0.5
        if not self._left_out:
            coupling.distance = squared_distance(self.tensors, mean.to(self._device)) / self._sizes[0]
        return means
