"""What ranks tell each other without a collective: a store on rank 0, which a thread of every rank writes and reads."""

import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PERIOD = 0.5  # seconds between two beats
LIMIT = 30.0  # seconds after which a rank that does not answer counts as stuck

DONE = b"done"
_kept: list[dist.TCPStore] = []


class Board:
    """The last that every rank has written, read a few times a second.

    Only the thread talks to the store: a call to a rank 0 that stands still never returns. The store listens only at
    the address by which the others reach rank 0. What is on it is read as if a stranger had written it: what makes no
    sense is nothing.

    Args:
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        place: where this rank waits for others; written with its next beat.
        beats: by rank, its counter and its place; DONE when it has come to its end.
        changed: by rank, when its beat was seen to change.
        heard: when the store last answered.
        closed: whether the store is gone, and rank 0 with it.
        lost: ranks that some rank has found gone.
        reasons: by rank that has left, why.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._size = rank, world_size
        self._outbox: list[tuple[str, str]] = []
        self._wake, self._ended, self._sent = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)
        self.place = ""
        self.beats = [b""] * world_size
        self.changed = [time.monotonic()] * world_size
        self.heard = time.monotonic()
        self.closed = False
        self.lost: list[int] = []
        self.reasons: dict[int, str] = {}

    def connect(self, host: str) -> str | None:
        """Open the store and start the thread, on all ranks or on none. A collective.

        Args:
            host: rank 0's, as the others reach it.

        Returns:
            None, or why there is no store.
        """
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
                self._store.set(f"beat/{self._rank}", "0")
                self._store.set(f"reason/{self._rank}", "")
        except RuntimeError as caught:
            error = f"rank {self._rank}: {caught}"
        errors: list[str | None] = [None] * self._size
        dist.all_gather_object(errors, error)
        first = next((e for e in errors if e), None)
        if first is None:
            self.heard = time.monotonic()
            self.changed = [self.heard] * self._size
            self._thread.start()
        return first

    def _run(self) -> None:
        count = 0
        while not self._ended.is_set():
            self._wake.wait(PERIOD)
            self._wake.clear()
            count += 1
            try:
                self._write(f"{count} {self.place}")
                self._read()
                self.closed = False
            except RuntimeError:
                self.closed = True
        with suppress(RuntimeError):
            self._write(DONE.decode())

    def _write(self, beat: str) -> None:
        posts, self._outbox = self._outbox, []
        for key, value in posts:
            self._store.set(key, value)
        self._store.set(f"beat/{self._rank}", beat)
        if not self._outbox:
            self._sent.set()

    def _read(self) -> None:
        ranks = range(self._size)
        keys = [*(f"beat/{r}" for r in ranks), *(f"reason/{r}" for r in ranks), "lost"]
        *values, lost = self._store.multi_get(keys)
        now = time.monotonic()
        latest, reasons = values[: self._size], values[self._size :]
        self.changed = [
            now if new != old else at for new, old, at in zip(latest, self.beats, self.changed, strict=True)
        ]
        self.lost = [int(r) for r in lost.decode(errors="replace").split(",") if r.isascii() and r.isdecimal()]
        self.lost = [rank for rank in self.lost if rank < self._size]
        self.reasons = {rank: text.decode(errors="replace") for rank, text in enumerate(reasons) if text}
        self.beats, self.heard = latest, now

    def post(self, key: str, value: str, patience: float) -> None:
        """Write something, and wait until it is on the board, for ``patience`` seconds at most."""
        self._sent.clear()
        self._outbox.append((key, value))
        self._wake.set()
        self._sent.wait(patience)

    def count(self, rank: int) -> int:
        """Return a rank's counter."""
        text = self.beats[rank].split(b" ")[0]
        return int(text) if text.isdigit() else 0

    def stop(self, patience: float) -> None:
        """Write that this rank is done, and end the thread, for ``patience`` seconds at most."""
        self._ended.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(patience)
        if self._rank == 0 and hasattr(self, "_store"):
            _kept.append(self._store)  # the others may still read it


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
        # The store owns the socket from here on. Older versions of torch take it without libuv alone.
        master: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "timeout": timeout}
        kept = os.dup(listener.fileno())
        try:
            store = dist.TCPStore(host, port, master_listen_fd=listener.detach(), **master)
        except NotImplementedError:
            return dist.TCPStore(host, port, master_listen_fd=kept, use_libuv=False, **master)
        os.close(kept)
        return store
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
