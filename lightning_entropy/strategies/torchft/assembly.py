"""Where replicas that come and go meet: whoever is there at an outer step, by torchft's lighthouse."""

import io
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.strategies.torchft.encounter import Encounter
from lightning_entropy.strategies.torchft.lighthouse import said_by
from lightning_entropy.strategies.torchft.peers import Closed, Peers
from lightning_entropy.strategies.torchft.records import Met, Record, most_wanted
from lightning_entropy.strategies.torchft.rounding import ALONE, NEW, Rounding
from lightning_entropy.strategies.torchft.transfer import StateServer
from lightning_entropy.trainer.metrics import Event

ROUNDS = 10  # in which the others come to all their exchanges but this replica's, after which it is not waited for


class Assembly:
    """Meets the other replicas, in a thread of its own, one encounter after the other.

    A meeting is: a quorum of the lighthouse, which waits for those that met the last time and are alive; a process
    group of its members, made anew where they have changed; one exchange of records; one sum of what they send. Where
    it fails, because a member died in the middle, it is over without a result, and the next one is of those that are
    left.

    Args:
        replica: this one's number.
        lighthouse: its address, ``http://host:port``.
        min_replicas: how many must meet; fewer wait for others.
        timeout: after which waiting for a peer that is alive and silent is a failure.
        check: called every second while the training waits; raises an error if it should not.

    Attributes:
        replica: this one's number.
        present: those that met last.
        peers: the process group of those that meet.
    """

    def __init__(
        self,
        replica: int,
        lighthouse: str,
        *,
        min_replicas: int,
        timeout: timedelta,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.check = check
        self.replica, self.present = replica, [replica]
        self._lighthouse = lighthouse
        # Servers that cannot be reached are an error here and now.
        self.peers = Peers(replica, lighthouse, min_replicas=min_replicas, timeout=timeout)
        self._states = StateServer(self.peers.host, timeout.total_seconds())
        self._in_step = False
        self._serials = itertools.count(1)
        self._asked_for: int | None = None
        self._tasks: queue.SimpleQueue[Encounter | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"meeting of replica {replica}", daemon=True)
        self._thread.start()

    # Asked for by the training

    speaks = True  # this rank sends the payload; see Delegation
    single = True  # it has no others to agree with

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of the flags are set on any rank of this replica: it is one rank."""
        return list(flags)

    def exchange(
        self,
        payload: Tensor | None,
        *,
        ready: Event | None = None,
        stream: int = 0,
        version: int = -1,
        common: Callable[[], dict[str, Any]] | None = None,
        rounding: Rounding | None = None,
    ) -> Encounter:
        """Ask for the sum of a flat tensor over the replicas that meet next.

        Args:
            payload: on the CPU, float32 or float64; it is overwritten.
            ready: the payload is there when this has happened; None: it is.
            stream: which exchange this is, the same on all replicas.
            version: of what all replicas have in common; -1: nothing.
            common: returns it.
            rounding: of its first numbers; None: of none.
        """
        return self._ask(payload, stream, version, common, rounding, ready)

    def join(self) -> Encounter:
        """Ask for a meeting in which this replica, which has no state, finds one that has."""
        return self._ask(None, -1, -1, None)

    def _ask(
        self,
        payload: Tensor | None,
        stream: int,
        version: int,
        common: Callable[[], dict[str, Any]] | None,
        rounding: Rounding | None = None,
        ready: Event | None = None,
    ) -> Encounter:
        record = Record(
            replica=self.replica,
            joins=payload is None,
            stream=stream,
            size=0 if payload is None else payload.numel(),
            wide=payload is not None and payload.dtype == torch.float64,
            format="float32" if rounding is None else rounding.format,
            body=0 if rounding is None else rounding.size,
            key=ALONE if rounding is None else rounding.key,
            version=version,
            serial=next(self._serials),
            host=self._states.address[0],
            port=self._states.address[1],
            in_step=self._in_step,
        )
        encounter = Encounter(self, record, payload, common, rounding, ready)
        self._tasks.put(encounter)
        return encounter

    @property
    def wants_state(self) -> bool:
        """Whether a replica that joins waits for this one's state."""
        return self._asked_for is not None

    def asks(self) -> bool:
        """Return ``wants_state``."""
        return self.wants_state

    def give_state(self, state: dict[str, Any]) -> None:
        """Give a replica that joins this one's state, as it is now."""
        serial, self._asked_for = self._asked_for, None
        assert serial is not None
        self._states.offer(serial, state)

    def take_state(self, met: Met) -> dict[str, Any]:
        """Fetch the state of a replica that this one has met, as soon as it gives it.

        Raises:
            OSError: it is gone.
        """
        record = met.records[met.source]
        return self._states.fetch((record.host, record.port), record.serial)

    def explain(self) -> None:
        """Say for what this replica waits."""
        self.peers.say(f"waits for the other replicas at {self._lighthouse}{said_by(self._lighthouse)}")

    def close(self) -> None:
        """Leave: the others go on without this replica."""
        self.peers.closing = True
        self._tasks.put(None)
        self._states.close()
        self.peers.leave()
        self._thread.join(timeout=5.0)
        self.peers.abort()

    # In the thread

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._play(task)
            task.payload = task.rounding = None
            task.over.set()

    def _play(self, task: Encounter) -> None:
        """Meet, again where the others have come for another of their exchanges: in turn they come to all.

        Hence one that was late, or has joined, is soon in step with them; they have its zeros meanwhile, and no wait.
        """
        others: Counter[int] = Counter()
        try:
            task.collect()
            while isinstance(met := self._meet(task), int):
                others[met] += 1
                if others[met] > ROUNDS:
                    raise ValueError(
                        f"replicas must have the same optimizers and fragments, got exchange {task.record.stream} in "
                        f"replica {self.replica} and none such in {ROUNDS} rounds of most others"
                    )
                self.peers.failures = 0
                task.record = task.record._replace(serial=next(self._serials), in_step=False)
        except (RuntimeError, OSError) as error:
            if self.peers.closing:
                task.error = Closed("the assembly was closed")
                return
            self.peers.lose(error)
        except BaseException as error:  # a panic of torchft's is no Exception, and who waits must hear of it
            task.error = error
        else:
            self.peers.failures, self.present, task.met = 0, met.present, met

    def _meet(self, task: Encounter) -> Met | int:
        """Return what the next meeting brings, or for which exchange it was if not for this one."""
        self.peers.gather()
        self._states.withdraw()  # not before: one that joins is waited for here, and may be fetching its state yet
        met = Met(self.peers.records(task.record), self.peers.rank)
        living = [record for record in met.records if not record.joins]
        if met.source == self.peers.rank and len(living) < len(met.records) and len(met.records) > 1:
            self._asked_for = task.record.serial
        if not living:
            return met
        subject = most_wanted(living)
        own = task.record
        fits = own.subject == subject and not own.joins
        same = [record for record in living if record.subject == subject]
        keys = {record.key for record in same}
        met.whole = len(keys) > 1 or NEW in keys
        sent = (task.payload, task.rounding) if fits else (None, None)
        total = self.peers.sum(*sent, met, subject)
        versions = [record.version for record in same]
        if max(versions) >= 0:
            # What is common must change for all or for none, and all must have heard of it.
            self.peers.records(own)
            if min(versions) < max(versions):
                source = next(rank for rank, r in enumerate(met.records) if r in same and r.version == max(versions))
                common = self.peers.send_common(source, task.common, max(versions))
                if fits and own.version < max(versions):
                    met.common = torch.load(io.BytesIO(common.numpy().tobytes()), "cpu", weights_only=False)
        stream, size, wide, format, _ = subject
        self._in_step = fits
        if fits:
            met.total = total
        elif own.joins:
            return met
        elif own.stream != stream:
            return stream
        elif own.size == size and own.format != format:
            raise ValueError(
                f"communication_dtype must be the same for all replicas, got {own.format!r} in replica {self.replica} "
                f"and {format!r} in most others"
            )
        else:
            raise ValueError(
                f"replicas must train the same model, got {own.size} numbers of {4 + 4 * own.wide} bytes in replica "
                f"{self.replica} and {size} of {4 + 4 * wide} in most others"
            )
        return met
