"""Which ranks are alive, known without a collective."""

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
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
    The store is on rank 0; if it cannot be reached, rank 0 is gone.

    A collective with a dead rank mostly fails at once, but some ranks may be left waiting, until the process group's
    timeout, for others that have given up (Lightning's broadcast before every batch swallows errors). So the thread
    ends its process, with a message that names the rank, if a rank is silent and the main thread has not moved for
    30 seconds.

    Args:
        rank: this rank.
        world_size: number of ranks.
        host: rank 0's, as the others reach it.
        data_parallel: ranks of one replica, for messages.
    """

    def __init__(self, rank: int, world_size: int, host: str, data_parallel: int = 1) -> None:
        self._rank, self._data_parallel = rank, data_parallel
        self._keys = [f"beat/{r}" for r in range(world_size)]
        self._lost: list[int] = []  # ranks that some rank found gone, without those that end because of it
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
                self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
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
                self._thread_store.set(self._keys[self._rank], str(count))
                *latest, lost = self._thread_store.multi_get([*self._keys, "lost"])
                self._lost = _ranks(lost)
            except RuntimeError:
                latest = [beats[0], *(b"?" for _ in beats[1:])]  # rank 0 has stopped; the others are unknown
            pairs = zip(latest, beats, changed, strict=True)
            changed = [now if new != old or new in (b"?", DONE.encode()) else at for new, old, at in pairs]
            beats = latest
            silent = self._lost or [rank for rank, at in enumerate(changed) if now - at > LIMIT]
            if silent and now - moved > LIMIT:
                print(f"{self._message(silent)}, stuck for {now - moved:.0f} s", file=sys.stderr, flush=True)
                with suppress(RuntimeError):
                    self._tell(self._thread_store, silent)
                os._exit(1)

    def silent(self, patience: float | None = None) -> list[int]:
        """Return the ranks that some rank has found gone, or whose counter stands still for ``patience`` seconds.

        Returns as soon as all have counted.
        """
        try:
            lost = _ranks(self._store.get("lost")) or self._watch(PATIENCE if patience is None else patience)
            if lost:
                self._tell(self._store, lost)
        except RuntimeError:
            return self._lost or [0]
        return lost

    def _watch(self, patience: float) -> list[int]:
        first = self._store.multi_get(self._keys)
        silent = set(range(len(self._keys))) - {self._rank}
        end = time.monotonic() + patience
        while silent and time.monotonic() < end:
            time.sleep(PERIOD / 5)
            now = self._store.multi_get(self._keys)
            silent = {rank for rank in silent if now[rank] == first[rank] != DONE.encode()}
        return sorted(silent)

    def _tell(self, store: dist.TCPStore, lost: list[int]) -> None:
        """Publish who is gone. Rank 0, whose store ends with it, waits until their threads have read it."""
        store.set("lost", ",".join(map(str, lost)))
        if self._rank != 0:
            return
        others = set(range(len(self._keys))) - {self._rank, *lost}
        first = store.multi_get(self._keys)
        end = time.monotonic() + PATIENCE
        while others and time.monotonic() < end:
            time.sleep(PERIOD / 5)
            now = store.multi_get(self._keys)  # after two more beats a thread has read what was written before them
            others = {r for r in others if now[r] != DONE.encode() and int(now[r]) < int(first[r]) + 2}

    def named(self, error: RuntimeError) -> RuntimeError:
        """Return an error that names the ranks that are gone, for a collective's error; the same error if none is."""
        known = self._ended.is_set() or isinstance(error, ReplicaLost)
        silent = [] if known else self.silent()
        return ReplicaLost(f"{self._message(silent)}: {error}") if silent else error

    def _message(self, silent: list[int]) -> str:
        ranks = ", ".join(f"rank {rank} (replica {rank // self._data_parallel})" for rank in silent)
        return f"{ranks} stopped answering, and rank {self._rank} cannot go on"

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


def _ranks(text: bytes) -> list[int]:
    return [int(rank) for rank in text.decode().split(",") if rank]


def watch(grid: Grid, environment: ClusterEnvironment) -> Heartbeat | None:
    """Start this rank's heartbeat; None if it is alone. A collective.

    Args:
        grid: where this rank stands.
        environment: knows the host of rank 0.
    """
    if grid.world_size == 1:
        return None
    return Heartbeat(grid.rank, grid.world_size, environment.main_address, grid.data_parallel)
