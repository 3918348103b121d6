"""Which ranks are alive, known without a collective."""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.options import Grid

PERIOD = 0.5  # seconds between two beats
PATIENCE = 5.0  # seconds without a beat after which a rank is gone, once a collective has failed
LIMIT = 30.0  # seconds after which a rank that is stuck because of it ends itself

DONE = "done"
_kept: list[dist.TCPStore] = []


class ReplicaLost(RuntimeError):
    """A rank died or hangs; the message names it."""


class Heartbeat:
    """A thread of every rank increments a counter in a store; a rank whose counter has stopped is gone.

    The thread keeps counting while its process waits in a collective, so a waiting rank is not taken for a dead one.
    A rank that leaves because of an exception says why in the store. The store is on rank 0, and listens only at the
    address by which the others reach it; if it cannot be reached, rank 0 is gone. What others may write there is read
    as if a stranger had: what makes no sense is no answer.

    A collective with a dead rank mostly fails at once, but some ranks may be left waiting, until the process group's
    timeout, for others that have given up (Lightning's broadcast before every batch swallows errors). So the thread
    ends its process, with a message that names the rank, if a rank is silent and the main thread has not moved for
    30 seconds. So it does if all ranks are alive and wait for each other, but not at the same place: one has stopped
    training, say, and another is at its next outer step. Where a rank has waited for long is part of its beat.

    Args:
        rank: this rank.
        world_size: number of ranks.
        host: rank 0's, as the others reach it.
        data_parallel: ranks of one replica, for messages.
    """

    def __init__(self, rank: int, world_size: int, host: str, data_parallel: int = 1) -> None:
        self._rank, self._data_parallel = rank, data_parallel
        self._keys = [f"beat/{r}" for r in range(world_size)]
        self._reason_keys = [f"reason/{r}" for r in range(world_size)]
        self._lost: list[int] = []  # ranks that some rank found gone, without those that end because of it
        self._reasons: dict[int, str] = {}  # by rank: why it has left
        self._at = ""  # where this rank waits for others; empty: nowhere
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if self._connect(host):
            atexit.register(self.stop)
            self._thread.start()
        else:
            self._ended.set()

    def _connect(self, host: str) -> bool:
        """Connect to the store, on all ranks or on none."""
        wait = timedelta(seconds=LIMIT)
        port, error = [0], None
        try:
            if self._rank == 0:
                self._store = listening_store(host, wait)
                self._store.set("lost", "")
                port = [self._store.port]
        except RuntimeError as caught:
            error = f"rank 0: {caught}"
        dist.broadcast_object_list(port, src=0)
        try:
            if port[0]:
                if self._rank != 0:
                    self._store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
                # The thread needs a connection of its own: a call that waits blocks the connection.
                self._thread_store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
                self._thread_store.set(self._keys[self._rank], "0")
                self._thread_store.set(self._reason_keys[self._rank], "")
        except RuntimeError as caught:
            error = f"rank {self._rank}: {caught}"
        errors: list[str | None] = [None] * len(self._keys)
        dist.all_gather_object(errors, error)
        if any(errors):
            first = next(e for e in errors if e)
            rank_zero_warn(f"a rank that dies will not be named: the store on {host} cannot be reached ({first})")
        return not any(errors)

    def _run(self) -> None:
        count, moved, spot = 0, time.monotonic(), None
        changed = [time.monotonic()] * len(self._keys)
        beats: list[bytes] = [b""] * len(self._keys)
        while not self._ended.wait(PERIOD):
            count += 1
            now = time.monotonic()
            frame = sys._current_frames().get(self._main)
            here = None if frame is None else (id(frame), frame.f_lasti)
            if here != spot:
                spot, moved = here, now
            try:
                place = self._at if now - moved > LIMIT / 2 else ""
                self._thread_store.set(self._keys[self._rank], f"{count} {place}")
                latest = self._read(self._thread_store)
            except RuntimeError:
                latest = [beats[0], *(b"?" for _ in beats[1:])]  # rank 0 has stopped; the others are unknown
            pairs = zip(latest, beats, changed, strict=True)
            changed = [now if new != old or new in (b"?", DONE.encode()) else at for new, old, at in pairs]
            beats = latest
            silent = self._gone or [rank for rank, at in enumerate(changed) if now - at > LIMIT]
            if silent and now - moved > LIMIT:
                print(f"{self._message(silent)}, stuck for {now - moved:.0f} s", file=sys.stderr, flush=True)
                with suppress(RuntimeError):
                    self._tell(self._thread_store, silent)
                os._exit(1)

            if now - moved > LIMIT and (crossed := self._crossed(latest)):
                print(f"{crossed}, for {now - moved:.0f} s", file=sys.stderr, flush=True)
                with suppress(RuntimeError):
                    self._thread_store.set(self._reason_keys[self._rank], crossed)
                os._exit(1)

    def _crossed(self, beats: list[bytes]) -> str | None:
        """Return a message if all ranks wait for others at different places, so that nobody will come."""
        places = [beat.decode(errors="replace").partition(" ")[2] for beat in beats]
        if not all(places) or len(set(places)) == 1:
            return None
        where = ", ".join(f"{self._name(rank)} at {place}" for rank, place in enumerate(places))
        return f"the ranks wait for each other at different places: {where}"

    @contextmanager
    def meeting(self, where: str) -> Iterator[None]:
        """Wait for other ranks inside of the block; an error names the ranks that are gone.

        Args:
            where: the name of the place, the same on all ranks that meet there.
        """
        before, self._at = self._at, where
        try:
            yield
        except RuntimeError as error:
            named = self.named(error)
            if named is error:
                raise
            raise named from error
        finally:
            self._at = before

    def silent(self, patience: float | None = None) -> list[int]:
        """Return the ranks that some rank has found gone, or whose counter stands still for ``patience`` seconds.

        Returns as soon as all have counted.
        """
        try:
            lost = (self._read(self._store) and self._gone) or self._watch(PATIENCE if patience is None else patience)
            if lost:
                self._tell(self._store, lost)
        except RuntimeError:
            return self._gone or [0]
        return lost

    @property
    def _gone(self) -> list[int]:
        """The ranks that are known to be gone or to have left, without this one."""
        return [rank for rank in (self._lost or sorted(self._reasons)) if rank != self._rank]

    def _read(self, store: dist.TCPStore) -> list[bytes]:
        """Read who is gone and why; return all counters."""
        n = len(self._keys)
        *values, lost = store.multi_get([*self._keys, *self._reason_keys, "lost"])
        self._lost = _ranks(lost, n)
        self._reasons = {rank: text.decode(errors="replace") for rank, text in enumerate(values[n:]) if text}
        return values[:n]

    def _watch(self, patience: float) -> list[int]:
        first = self._read(self._store)
        silent = set(range(len(self._keys))) - {self._rank}
        end = time.monotonic() + patience
        while silent and time.monotonic() < end:
            time.sleep(PERIOD / 5)
            now = self._read(self._store)
            if self._gone:
                return self._gone
            silent = {rank for rank in silent if now[rank] == first[rank] != DONE.encode()}
        if not silent:  # then it is one that has come to its end, and waits for nobody
            silent = {rank for rank, beat in enumerate(self._read(self._store)) if beat == DONE.encode()}
            self._reasons |= dict.fromkeys(silent, "its fit")
        return sorted(silent - {self._rank})

    def _tell(self, store: dist.TCPStore, lost: list[int]) -> None:
        """Publish who is gone. Rank 0, whose store ends with it, waits until their threads have read it."""
        store.set("lost", ",".join(map(str, lost)))
        self._wait_until_read(store, lost)

    def _wait_until_read(self, store: dist.TCPStore, lost: list[int]) -> None:
        if self._rank != 0:
            return
        others = set(range(len(self._keys))) - {self._rank, *lost}
        first = store.multi_get(self._keys)
        end = time.monotonic() + PATIENCE
        while others and time.monotonic() < end:
            time.sleep(PERIOD / 5)
            now = store.multi_get(self._keys)  # after two more beats a thread has read what was written before them
            others = {r for r in others if now[r] != DONE.encode() and _count(now[r]) < _count(first[r]) + 2}

    def named(self, error: RuntimeError) -> RuntimeError:
        """Return an error that names the ranks that are gone, for a collective's error; the same error if none is."""
        known = self._ended.is_set() or isinstance(error, ReplicaLost)
        silent = [] if known else self.silent()
        return ReplicaLost(f"{self._message(silent)}: {error}") if silent else error

    def _message(self, silent: list[int]) -> str:
        ended = ", ".join(
            f"{self._name(rank)} ended with {self._reasons[rank]}" for rank in silent if rank in self._reasons
        )
        quiet = ", ".join(self._name(rank) for rank in silent if rank not in self._reasons)
        facts = [*([ended] if ended else []), *([f"{quiet} stopped answering"] if quiet else [])]
        return f"{', '.join(facts)}, and rank {self._rank} cannot go on"

    def _name(self, rank: int) -> str:
        return f"rank {rank} (replica {rank // self._data_parallel})"

    def leave(self, exception: BaseException) -> None:
        """Tell the others why this rank ends, unless it is because another has."""
        if self._ended.is_set() or isinstance(exception, ReplicaLost):
            return
        text = f"{type(exception).__name__}: {exception}" if str(exception) else type(exception).__name__
        with suppress(RuntimeError):
            self._store.set(self._reason_keys[self._rank], " ".join(text.split())[:300])
            self._wait_until_read(self._store, [])

    def wait_for_others(self) -> None:
        """Wait until the other ranks are done or gone, for seconds at most: they may be writing their checkpoints."""
        end = time.monotonic() + PATIENCE
        with suppress(RuntimeError):
            while not self._ended.is_set() and time.monotonic() < end:
                beats = self._read(self._store)
                if all(beat == DONE.encode() for rank, beat in enumerate(beats) if rank != self._rank):
                    return
                time.sleep(PERIOD / 5)

    def stop(self) -> None:
        """Stop the thread and tell the others: a rank that is done is not gone."""
        if self._ended.is_set():
            return
        atexit.unregister(self.stop)
        self._ended.set()
        self._thread.join()  # an interpreter that exits while a thread is in a C++ call aborts
        try:
            self._store.set(self._keys[self._rank], DONE)
        except RuntimeError:
            return  # rank 0 is gone
        if self._rank == 0:
            _kept.append(self._store)  # the others may still read it


def _ranks(text: bytes, n: int) -> list[int]:
    """Return the ranks below n in a list of them; what makes no sense is none."""
    ranks = [int(r) for r in text.decode(errors="replace").split(",") if r.isascii() and r.isdecimal()]
    return [rank for rank in ranks if rank < n]


def _count(text: bytes) -> int:
    count = text.split(b" ")[0]
    return int(count) if count.isdigit() else 0


def listening_store(host: str, timeout: timedelta) -> dist.TCPStore:
    """Return a store that listens at the address of ``host`` alone, if that is this machine's, at a port of its own.

    Args:
        host: by which the other ranks reach this one.
        timeout: of the store's calls.
    """
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
            listener.listen(128)
            port = listener.getsockname()[1]
        except OSError:  # a name that leads here by way of another machine
            listener.close()
            continue
        # The store owns the socket from here on.
        return dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
        )
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def meeting(heartbeat: Heartbeat | None, where: str) -> AbstractContextManager[None]:
    """Wait for other ranks inside of the block, with a heartbeat if there is one; see :meth:`Heartbeat.meeting`."""
    return nullcontext() if heartbeat is None else heartbeat.meeting(where)


def watch(grid: Grid, environment: ClusterEnvironment) -> Heartbeat | None:
    """Start this rank's heartbeat; None if it is alone. A collective.

    Args:
        grid: where this rank stands.
        environment: knows the host of rank 0.
    """
    if grid.world_size == 1:
        return None
    if dist.get_backend() == "gloo":
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=LIMIT), wait_all_ranks=True)
        except RuntimeError as error:  # which names the ranks that did not come
            raise ReplicaLost(f"a rank has not joined, and rank {grid.rank} cannot go on: {error}") from error
    return Heartbeat(grid.rank, grid.world_size, environment.main_address, grid.data_parallel)
