"""Which ranks are alive, known without a collective."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies import board
from lightning_entropy.strategies.board import DONE, Board
from lightning_entropy.strategies.options import Grid

PATIENCE = 5.0  # seconds without a beat after which a rank is gone, once a collective has failed


class ReplicaLost(RuntimeError):
    """A rank died or hangs; the message names it."""


class Heartbeat:
    """Every rank counts on a board; a rank whose counter has stopped is gone, and rank 0 if the board has.

    A rank goes on counting while its process waits in a collective, so a waiting rank is not taken for a dead one. One
    that leaves because of an exception says why.

    A collective with a dead rank mostly fails at once, but some ranks may be left waiting, until the process group's
    timeout, for others that have given up. So a second thread ends its process, with a message that names the rank, if
    a rank is silent and the main thread has not moved for 30 seconds. So it does if all ranks are alive and wait for
    each other, but not at the same place: one has stopped training, say, and another is at its next outer step. Where a
    rank has waited for long is part of its beat.

    Args:
        rank: this rank.
        world_size: number of ranks.
        host: rank 0's, as the others reach it.
        data_parallel: ranks of one replica, for messages.
    """

    def __init__(self, rank: int, world_size: int, host: str, data_parallel: int = 1) -> None:
        self._rank, self._data_parallel = rank, data_parallel
        self._others = [r for r in range(world_size) if r != rank]
        self._board = Board(rank, world_size)
        self._at = ""  # where this rank waits for others; empty: nowhere
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="heartbeat", daemon=True)
        error = self._board.connect(host)
        if error is None:
            atexit.register(self.stop)
            self._thread.start()
        else:
            rank_zero_warn(f"a rank that dies will not be named: the store on {host} cannot be reached ({error})")
            self._ended.set()

    def _guard(self) -> None:
        moved, spot = time.monotonic(), None
        while not self._ended.wait(board.PERIOD):
            now = time.monotonic()
            frame = sys._current_frames().get(self._main)
            here = None if frame is None else (id(frame), frame.f_lasti)
            if here != spot:
                spot, moved = here, now
            self._board.place = self._at if now - moved > board.LIMIT / 2 else ""
            if now - moved <= board.LIMIT:
                continue
            silent = self._gone or self._silent_for(board.LIMIT)
            if silent:
                print(f"{self._message(silent)}, stuck for {now - moved:.0f} s", file=sys.stderr, flush=True)
                self._tell(silent)
                os._exit(1)
            crossed = self._crossed()
            if crossed is not None:
                print(f"{crossed}, for {now - moved:.0f} s", file=sys.stderr, flush=True)
                self._board.post(f"reason/{self._rank}", crossed, PATIENCE)
                os._exit(1)

    def _silent_for(self, seconds: float) -> list[int]:
        """Return the ranks whose counter has stood still for so long."""
        if self._board.closed or time.monotonic() - self._board.heard > seconds:
            return [0] if self._rank != 0 else []  # nothing is known of the others
        still = [rank for rank in self._others if self._board.heard - self._board.changed[rank] > seconds]
        return [rank for rank in still if self._board.beats[rank] != DONE]

    def _crossed(self) -> str | None:
        """Return a message if all ranks wait for others at different places, so that nobody will come."""
        places = [beat.decode(errors="replace").partition(" ")[2] for beat in self._board.beats]
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
        lost = self._watch(PATIENCE if patience is None else patience)
        if lost:
            self._tell(lost)
        return lost

    @property
    def _gone(self) -> list[int]:
        """The ranks that are known to be gone or to have left, without this one."""
        return [rank for rank in (self._board.lost or sorted(self._board.reasons)) if rank != self._rank]

    def _watch(self, patience: float) -> list[int]:
        start, waited = time.monotonic(), set(self._others)
        first: list[bytes] | None = None  # as read from now on: what was read before may be followed by a last beat
        while waited and time.monotonic() - start < patience:
            if self._gone:
                return self._gone
            if self._board.closed:
                return [0]
            beats = self._board.beats
            if first is not None:
                waited = {rank for rank in waited if beats[rank] == first[rank] != DONE}
            elif self._board.heard > start:
                first = beats
            time.sleep(board.PERIOD / 5)
        if self._gone:
            return self._gone
        if waited and self._board.heard < start:
            return [0]
        if not waited:  # then it is one that has come to its end, and waits for nobody
            waited = {rank for rank in self._others if self._board.beats[rank] == DONE}
            self._board.reasons |= dict.fromkeys(waited, "its fit")
        return sorted(waited)

    def _tell(self, lost: list[int]) -> None:
        """Publish who is gone. Rank 0, whose board ends with it, waits until the others have read it."""
        self._board.post("lost", ",".join(map(str, lost)), PATIENCE / 2)
        self._wait_until_read(lost)

    def _wait_until_read(self, lost: list[int]) -> None:
        if self._rank != 0:
            return
        # After two more beats a rank has read what was written before them.
        read = {rank: self._board.count(rank) + 2 for rank in self._others if rank not in lost}
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(
            self._board.beats[rank] != DONE and self._board.count(rank) < count for rank, count in read.items()
        ):
            time.sleep(board.PERIOD / 5)

    def named(self, error: RuntimeError) -> RuntimeError:
        """Return an error that names the ranks that are gone, for a collective's error; the same error if none is."""
        known = self._ended.is_set() or isinstance(error, ReplicaLost)
        silent = [] if known else self.silent()
        return ReplicaLost(f"{self._message(silent)}: {error}") if silent else error

    def _message(self, silent: list[int]) -> str:
        reasons = self._board.reasons
        ended = ", ".join(f"{self._name(rank)} ended with {reasons[rank]}" for rank in silent if rank in reasons)
        quiet = ", ".join(self._name(rank) for rank in silent if rank not in reasons)
        facts = [*([ended] if ended else []), *([f"{quiet} stopped answering"] if quiet else [])]
        return f"{', '.join(facts)}, and rank {self._rank} cannot go on"

    def _name(self, rank: int) -> str:
        return f"rank {rank} (replica {rank // self._data_parallel})"

    def leave(self, exception: BaseException) -> None:
        """Tell the others why this rank ends, unless it is because another has."""
        if self._ended.is_set() or isinstance(exception, ReplicaLost):
            return
        text = f"{type(exception).__name__}: {exception}" if str(exception) else type(exception).__name__
        self._board.post(f"reason/{self._rank}", " ".join(text.split())[:300], PATIENCE / 2)
        self._wait_until_read([])

    def wait_for_others(self) -> None:
        """Wait until the other ranks are done or gone, for seconds at most: they may be writing their checkpoints."""
        end = time.monotonic() + PATIENCE
        while not self._ended.is_set() and time.monotonic() < end:
            if all(self._board.beats[rank] == DONE for rank in self._others):
                return
            time.sleep(board.PERIOD / 5)

    def stop(self) -> None:
        """Stop the threads and tell the others: a rank that is done is not gone."""
        if self._ended.is_set():
            return
        atexit.unregister(self.stop)
        self._ended.set()
        self._thread.join()  # an interpreter that exits while a thread is in a C++ call aborts
        self._board.stop(PATIENCE)


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
            dist.monitored_barrier(timeout=timedelta(seconds=board.LIMIT), wait_all_ranks=True)
        except RuntimeError as error:  # which names the ranks that did not come
            raise ReplicaLost(f"a rank has not joined, and rank {grid.rank} cannot go on: {error}") from error
    return Heartbeat(grid.rank, grid.world_size, environment.main_address, grid.data_parallel)
