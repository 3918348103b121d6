"""Who is alive, known without a collective."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist


class ReplicaLost(RuntimeError):
    """A rank died or hangs; the message names it."""


class Heartbeat:
    """Every rank counts up in a store, from a thread; a rank whose count stands still is gone.

    The thread goes on while its process waits in a collective, so that one that waits is not taken for one that died.
    The store is on rank 0; where it cannot be reached, rank 0 is the one that is gone.

    Args:
        rank: this rank.
        world_size: ranks.
        host: where rank 0 is, as the others reach it.
        period: seconds between two beats.
    """

    def __init__(self, rank: int, world_size: int, host: str, period: float = 0.5) -> None:
        self._rank, self._world_size, self._period = rank, world_size, period
        wait = timedelta(seconds=30)
        port: list[int] = [0]
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = [self._store.port]
        dist.broadcast_object_list(port, src=0)
        if rank != 0:
            self._store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
        # A thread of its own needs a connection of its own: a call that waits holds it.
        self._thread_store = dist.TCPStore(host, port[0], is_master=False, timeout=wait)
        self._ended = threading.Event()
        self._beat(0)
        dist.barrier()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _beat(self, count: int) -> None:
        self._thread_store.set(f"beat/{self._rank}", str(count))

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(self._period):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:
                return  # rank 0 and its store are gone

    def silent(self, patience: float = 5.0) -> list[int]:
        """Give the ranks that do not count up within ``patience`` seconds; returns as soon as all do."""
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        try:
            first = self._store.multi_get(keys)
            silent = set(range(self._world_size)) - {self._rank}
            end = time.monotonic() + patience
            while silent and time.monotonic() < end:
                time.sleep(self._period / 5)
                now = self._store.multi_get(keys)
                silent = {rank for rank in silent if now[rank] == first[rank]}
        except RuntimeError:
            return [0]
        return sorted(silent)

    def named(self, error: RuntimeError, data_parallel: int = 1) -> RuntimeError:
        """Give an error that names the ranks that are gone; the same error where none is.

        Args:
            error: of a collective.
            data_parallel: ranks of one replica.
        """
        silent = [] if isinstance(error, ReplicaLost) else self.silent()
        if not silent:
            return error
        ranks = ", ".join(f"rank {rank} (replica {rank // data_parallel})" for rank in silent)
        return ReplicaLost(f"{ranks} stopped answering, and rank {self._rank} cannot go on: {error}")

    def stop(self) -> None:
        """End the thread."""
        with suppress(RuntimeError):
            self._ended.set()
