"""Where replicas that come and go meet: whoever is there at an outer step, by torchft's lighthouse."""

import io
import itertools
import json
import queue
import re
import socket
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, BroadcastOptions

from lightning_entropy.strategies.torchft.collectives import MeetingCollectives
from lightning_entropy.strategies.torchft.internals import Quorum, open_group, start_server
from lightning_entropy.strategies.torchft.records import Met, Record, Subject, most_wanted
from lightning_entropy.strategies.torchft.rounding import ALONE, NEW, Rounding
from lightning_entropy.strategies.torchft.transfer import StateServer

CONNECT = timedelta(seconds=15)  # for a server or a peer that is there to answer
PAUSE = 0.5  # seconds between two questions whether enough replicas have come
TICK = 1.0  # seconds between two questions whether one still wants to wait
PATIENCE = 10.0  # seconds after which a replica that waits says for what
BYTES = 512  # of a record
ROUNDS = 10  # in which the others come to all their exchanges but this replica's, after which it is not waited for


class Encounter:
    """A meeting that has been asked for.

    Args:
        assembly: the place.
        record: of this replica.
        payload: what it sends, flat; it is overwritten. None: it joins.
        rounding: of the first numbers of it; None: of none.
        common: returns what all replicas have in common, for those that have missed some of it.
    """

    def __init__(
        self,
        assembly: "Assembly",
        record: Record,
        payload: Tensor | None,
        common: Callable[[], dict[str, Any]] | None,
        rounding: Rounding | None = None,
    ) -> None:
        self.record, self.payload, self.common, self.rounding = record, payload, common, rounding
        self.met: Met | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._assembly = assembly
        self._since: float | None = None  # it is waited for
        self._patience = PATIENCE

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self.over.is_set()

    def wait(self) -> Met | None:
        """Wait until it is over and return what it has brought; None: a peer was lost in the middle.

        Raises:
            ValueError: this replica trains another model than most.
        """
        while not self.look():
            self._assembly.check()
        if self.error is not None:
            raise self.error
        return self.met

    def look(self) -> bool:
        """Wait for a second at most, and return whether it is over. After some it is said for what it waits."""
        if self._since is None:
            self._since = time.monotonic()
        if self.over.wait(TICK):
            return True
        if time.monotonic() - self._since > self._patience:
            self._assembly.explain()
            self._patience *= 2
        return False


class Closed(Exception):
    """The assembly was closed while a replica waited in it."""


class NoLighthouse(Exception):
    """The lighthouse cannot be reached; the message says what to do."""


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
        self._lighthouse, self._min_replicas, self._limit = lighthouse, min_replicas, timeout
        host = address_toward(lighthouse)
        # Servers that cannot be reached are an error here and now.
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._states = StateServer(host, timeout.total_seconds())
        self._server: Any = None
        self._client: Any = None
        self._host = host
        self._group = open_group(CONNECT)
        self._group_id, self._rank, self._size = -1, 0, 1
        self._failures, self._in_step = 0, False
        self._serials = itertools.count(1)
        self._asked_for: int | None = None
        self._closing = False
        self._told = 0
        self._tasks: queue.SimpleQueue[Encounter | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"meeting of replica {replica}", daemon=True)
        self._thread.start()

    # Asked for by the training

    speaks = True  # this rank sends the payload; see Delegation

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return which of the flags are set on any rank of this replica: it is one rank."""
        return list(flags)

    def exchange(
        self,
        payload: Tensor | None,
        *,
        stream: int = 0,
        version: int = -1,
        common: Callable[[], dict[str, Any]] | None = None,
        rounding: Rounding | None = None,
    ) -> Encounter:
        """Ask for the sum of a flat tensor over the replicas that meet next.

        Args:
            payload: on the CPU, float32 or float64; it is overwritten.
            stream: which exchange this is, the same on all replicas.
            version: of what all replicas have in common; -1: nothing.
            common: returns it.
            rounding: of its first numbers; None: of none.
        """
        return self._ask(payload, stream, version, common, rounding)

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
        encounter = Encounter(self, record, payload, common, rounding)
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
        self._say(f"waits for the other replicas at {self._lighthouse}{said_by(self._lighthouse)}")

    def close(self) -> None:
        """Leave: the others go on without this replica."""
        self._closing = True
        self._tasks.put(None)
        self._states.close()
        server, self._server, self._client = self._server, None, None
        if server is not None:
            server.shutdown()
        del server  # ends a request for a quorum that is still waiting
        self._thread.join(timeout=5.0)
        self._group.abort(errored=False)

    def _say(self, text: str) -> None:
        print(f"replica {self.replica} {text}", file=sys.stderr, flush=True)

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
            while isinstance(met := self._meet(task), int):
                others[met] += 1
                if others[met] > ROUNDS:
                    raise ValueError(
                        f"replicas must have the same optimizers and fragments, got exchange {task.record.stream} in "
                        f"replica {self.replica} and none such in {ROUNDS} rounds of most others"
                    )
                self._failures = 0
                task.record = task.record._replace(serial=next(self._serials), in_step=False)
        except (RuntimeError, OSError) as error:
            if self._closing:
                task.error = Closed("the assembly was closed")
                return
            self._failures += 1
            self._say(f"has lost a peer in a meeting and goes on without its result ({_short(error)})")
            # Others who wait for this one's numbers then know at once, and not at the end of their patience.
            self._group.abort(errored=False)
            self._group_id = -1
        except BaseException as error:  # a panic of torchft's is no Exception, and who waits must hear of it
            task.error = error
        else:
            self._failures, self.present, task.met = 0, met.present, met

    def _meet(self, task: Encounter) -> Met | int:
        """Return what the next meeting brings, or for which exchange it was if not for this one."""
        self._gather()
        self._states.withdraw()  # not before: one that joins is waited for here, and may be fetching its state yet
        met = Met(self._records(task.record), self._rank)
        living = [record for record in met.records if not record.joins]
        if met.source == self._rank and len(living) < len(met.records) and len(met.records) > 1:
            self._asked_for = task.record.serial
        if not living:
            return met
        subject = most_wanted(living)
        own = task.record
        fits = own.subject == subject and not own.joins
        same = [record for record in living if record.subject == subject]
        keys = {record.key for record in same}
        met.whole = len(keys) > 1 or NEW in keys
        total = self._sum(task, met, subject, fits=fits)
        versions = [record.version for record in same]
        if max(versions) >= 0:
            # What is common must change for all or for none, and all must have heard of it.
            self._records(own)
            if min(versions) < max(versions):
                source = next(rank for rank, r in enumerate(met.records) if r in same and r.version == max(versions))
                met.common = self._catch_up(source, task, max(versions), wanted=fits)
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

    def _gather(self) -> None:
        """Wait until enough replicas have come, and form a process group of them."""
        while True:
            if self._closing:
                raise Closed("the assembly was closed")
            quorum = Quorum(self._client or self._start(), self._failures)
            if quorum.size >= self._min_replicas:
                break
            if quorum.size != self._told:
                self._say(
                    f"waits at {self._lighthouse}: {self._min_replicas} replicas are needed (min_replicas), "
                    f"{quorum.size} {'is' if quorum.size == 1 else 'are'} here"
                )
            self._told = quorum.size
            time.sleep(PAUSE)
        self._told = 0
        if quorum.id != self._group_id:
            self._group.configure(quorum.store, str(self.replica), quorum.rank, quorum.size, quorum.id)
            self._group_id = quorum.id
        self._rank, self._size = quorum.rank, quorum.size

    def _start(self) -> Any:
        """Let the lighthouse know this replica.

        Not before its first meeting: the others wait for every replica that the lighthouse hears of.
        """
        name = f"{self.replica}:{self._store.port}-{time.time_ns():x}"
        store = f"{_bracketed(self._host)}:{self._store.port}"
        try:
            self._server, self._client = start_server(name, self._lighthouse, self._host, store, CONNECT)
        except (RuntimeError, OSError) as error:
            raise NoLighthouse(
                f"no lighthouse answers at {self._lighthouse} ({_short(error)}): start one with torchft_lighthouse, or "
                "everything with python -m lightning_entropy.launch, and set TORCHFT_LIGHTHOUSE to its address"
            ) from error
        return self._client

    def _records(self, own: Record) -> list[Record]:
        text = json.dumps(own).encode().ljust(BYTES)
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        all_ = [torch.empty_like(mine) for _ in range(self._size)]
        options = AllgatherOptions()
        options.timeout = CONNECT
        self._finish(self._group.allgather([all_], [mine], options))
        return [Record(*json.loads(bytes(record.tolist()))) for record in all_]

    def _sum(self, task: Encounter, met: Met, subject: Subject, *, fits: bool) -> Tensor:
        """Return the sum of what the replicas send, of which some numbers may be rounded."""
        _, size, wide, format, body = subject
        payload = task.payload if fits and task.payload is not None else torch.zeros(size, dtype=_dtype(wide))
        group = MeetingCollectives(self._group, self._size, self._limit, self._finish)
        if not body:
            group.all_reduce(payload).wait()
            met.bytes = payload.numel() * payload.element_size()
            return payload
        rounding = task.rounding if fits and task.rounding is not None else Rounding(format, body)
        first, rest = payload.split([body, size - body])
        group.all_reduce(rest).wait()
        total, met.left = rounding.sum(first, group, self._rank, whole=met.whole)
        met.bytes = rounding.payload + rest.numel() * rest.element_size()
        return torch.cat([total, rest])

    def _catch_up(self, source: int, task: Encounter, version: int, *, wanted: bool) -> dict[str, Any] | None:
        """Send what all have in common from the first that has it to those that have missed some of it."""
        data = torch.zeros(0, dtype=torch.uint8)
        if self._rank == source:
            assert task.common is not None
            buffer = io.BytesIO()
            torch.save({"version": version, **task.common()}, buffer)
            data = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        options = BroadcastOptions()
        options.rootRank, options.timeout = source, self._limit
        self._finish(self._group.broadcast([length], options))
        if self._rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._finish(self._group.broadcast([data], options))
        if task.record.version >= version or not wanted:
            return None
        common: dict[str, Any] = torch.load(io.BytesIO(data.numpy().tobytes()), "cpu", weights_only=False)
        return common

    def _finish(self, work: Any) -> None:
        """Wait for a collective, but not for longer than the assembly is open."""
        nap = 0.0005
        while not work.is_completed():
            if self._closing:
                raise RuntimeError("the assembly was closed")
            time.sleep(nap)
            nap = min(1.5 * nap, 0.02)
        work.wait()


def address_toward(lighthouse: str) -> str:
    """Return the address of this machine's interface toward the lighthouse, as other replicas can reach it.

    Args:
        lighthouse: its address, ``http://host:port``.

    Raises:
        ValueError: it is none.

    Example:
        >>> address_toward("http://127.0.0.1:29510")
        '127.0.0.1'
    """
    parts = urlsplit(lighthouse)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"the lighthouse's address must be http://host:port, got {lighthouse!r}")
    family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def said_by(lighthouse: str) -> str:
    """Return what the lighthouse says of the next quorum, as the end of a sentence; nothing if it does not answer."""
    try:
        with urllib.request.urlopen(f"{lighthouse}/status", timeout=2.0) as page:
            found = re.search(r"Next quorum status:\s*([^<\n]+)", page.read().decode())
    except (OSError, HTTPException):
        return ", which does not answer"
    return f", which says: {found[1].strip()}" if found else ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _short(error: Exception) -> str:
    """Return the first line of an error, without half a word at its end; its class where it says nothing.

    Example:
        >>> _short(RuntimeError("a peer " * 40))[-12:], _short(OSError())
        ('r a peer ...', 'OSError')
    """
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else type(error).__name__
