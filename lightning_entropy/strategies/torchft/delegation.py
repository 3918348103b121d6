"""Meetings of a replica of several ranks: the first one goes, and tells the others what they have brought."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_entropy.strategies.exchange import Meeting
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.encounter import TICK, Encounter
from lightning_entropy.strategies.torchft.records import Met
from lightning_entropy.strategies.torchft.rounding import Rounding
from lightning_entropy.trainer.metrics import Event

WHERE = "a meeting of the replicas"  # of errors that name a rank


class Delegation:
    """An :class:`Assembly` for all ranks of a job, each of which calls the same methods at the same steps.

    Only the first rank meets the other replicas: were each to meet its counterparts, one might lose a peer where
    another has not, and the ranks of a replica would no longer have the same weights. While it waits, the others wait
    for its word, which comes every second.

    Args:
        assembly: of the first rank; None on the others.
        check: called every second, by all ranks together, while they wait; raises an error if they should not.
        meeting: waits for other ranks of this job.
        timeout: after which a rank of this job that does not answer is an error.

    Attributes:
        speaks: whether this is the rank that goes to meetings.
        single: whether it is the only one: never.
        present: the replicas that met last.
        wants_state: whether a replica that joins waited for this one's state when :meth:`asks` was called last.
    """

    single = False

    def __init__(self, assembly: Assembly | None, *, check: Callable[[], None], meeting: Meeting, timeout: Any) -> None:
        self._assembly, self._check, self._meeting = assembly, check, meeting
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.speaks = assembly is not None
        self.present: list[int] = []
        self.wants_state = False

    # Between the ranks of this job

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of the flags are set on any rank."""
        agreed = torch.tensor([float(flag) for flag in flags])
        with self._meeting(WHERE):
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        return [value > 0 for value in agreed.tolist()]

    def _tell(self, value: Any) -> Any:
        """Return the first rank's value."""
        values = [value]
        with self._meeting(WHERE):
            dist.broadcast_object_list(values, 0, group=self._group)
        return values[0]

    def _until(self, over: Callable[[], bool]) -> None:
        """Wait until the first rank's ``over``, which takes a second at most, returns True."""
        while not self.agree([self.speaks and over()])[0]:
            self._check()

    def check_start(self, step: int) -> None:
        """Check that all ranks start from the same step; each has looked for a checkpoint by itself.

        Raises:
            MisconfigurationException: they do not.
        """
        first = self._tell(step)
        if self.agree([step != first])[0]:
            raise MisconfigurationException(
                f"the ranks of a replica must start from the same checkpoint, got one of step {first} on rank 0 and "
                "another elsewhere: other replicas have written one meanwhile. Start this replica again"
            )

    # With the other replicas

    def exchange(
        self,
        payload: Tensor | None,
        *,
        ready: Event | None = None,
        stream: int = 0,
        version: int = -1,
        common: Callable[[], dict[str, Any]] | None = None,
        rounding: Rounding | None = None,
    ) -> "Delegated":
        """Ask for the sum over the replicas that meet next, as :meth:`Assembly.exchange`; a payload of the first."""
        if self._assembly is None:
            return Delegated(self, None)
        assert payload is not None
        asked = self._assembly.exchange(
            payload, ready=ready, stream=stream, version=version, common=common, rounding=rounding
        )
        return Delegated(self, asked)

    def join(self) -> "Delegated":
        """Ask for a meeting in which this replica, which has no state, finds one that has."""
        return Delegated(self, None if self._assembly is None else self._assembly.join())

    def bring(self, encounter: Encounter | None) -> Met | None:
        """Wait until a meeting is over; return on all ranks what it has brought, or raise its error."""
        self._until(lambda: encounter is not None and encounter.look())
        met, error, shape = None, None, None
        if encounter is not None:
            met, error = encounter.met, encounter.error
            shape = None if met is None or met.total is None else (met.total.numel(), met.total.dtype)
        told = None if met is None else replace(met, total=None, left=None)
        told, error, shape = self._tell((told, error, shape))
        if error is not None:
            raise error
        met = met or told
        if met is None:
            return None
        if shape is not None:
            if met.total is None:
                met.total = torch.empty(shape[0], dtype=shape[1])
            with self._meeting(WHERE):
                dist.broadcast(met.total, 0, group=self._group)
        self.present = met.present
        return met

    def asks(self) -> bool:
        """Return whether a replica that joins waits for this one's state, as ``wants_state`` says from now on."""
        self.wants_state = self.agree([self._assembly is not None and self._assembly.wants_state])[0]
        return self.wants_state

    def give_state(self, state: dict[str, Any]) -> None:
        """Give a replica that joins the first rank's state, as it is now."""
        self.wants_state = False
        if self._assembly is not None:
            self._assembly.give_state(state)

    def take_state(self, met: Met) -> dict[str, Any]:
        """Fetch the state of a replica that this one has met, as soon as it gives it.

        Raises:
            OSError: it is gone.
        """
        with ThreadPoolExecutor(1) as pool:
            fetched: Future[dict[str, Any]] | None = None
            if self._assembly is not None:
                fetched = pool.submit(self._assembly.take_state, met)
            self._until(lambda: fetched is not None and bool(wait([fetched], TICK).done))
        error = None if fetched is None else fetched.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        failed = self._tell(error)
        if failed is not None:
            raise failed
        state: dict[str, Any] = self._tell(None if fetched is None else fetched.result())
        return state

    def close(self) -> None:
        """Leave: the others go on without this replica."""
        if self._assembly is not None:
            self._assembly.close()


class Delegated:
    """A meeting that has been asked for by the first rank, seen by one of them.

    Attributes:
        arrived: whether :meth:`wait` returns at once; before it has, the ranks cannot know it without each other.
    """

    arrived = False

    def __init__(self, delegation: Delegation, encounter: Encounter | None) -> None:
        self._delegation, self._encounter = delegation, encounter

    def wait(self) -> Met | None:
        """Wait until it is over and return what it has brought; None: a peer was lost in the middle.

        Raises:
            ValueError: this replica trains another model than most.
        """
        return self._delegation.bring(self._encounter)
