"""The replicas that meet: a quorum of the lighthouse, their process group, and what they send each other in it."""

import io
import json
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, BroadcastOptions

from lightning_entropy.strategies.torchft.collectives import MeetingCollectives
from lightning_entropy.strategies.torchft.internals import Quorum, open_group, start_server
from lightning_entropy.strategies.torchft.lighthouse import NoLighthouse, address_toward
from lightning_entropy.strategies.torchft.records import Met, Record, Subject
from lightning_entropy.strategies.torchft.rounding import Rounding

CONNECT = timedelta(seconds=15)  # for a server or a peer that is there to answer
PAUSE = 0.5  # seconds between two questions whether enough replicas have come
BYTES = 512  # of a record


class Closed(Exception):
    """The assembly was closed while a replica waited in it."""


class Peers:
    """This replica and those that it meets. A method that fails leaves it to :meth:`lose` to let the others know.

    Args:
        replica: this one's number.
        lighthouse: its address, ``http://host:port``.
        min_replicas: how many must meet; fewer wait for others.
        timeout: after which waiting for a peer that is alive and silent is a failure.

    Attributes:
        host: this machine's address, as the others can reach it.
        rank: of this replica among those that meet.
        size: how many they are.
        failures: meetings that have failed since the last one that has not.
        closing: nobody is to be waited for any more.

    Raises:
        ValueError: the lighthouse's address is none.
    """

    def __init__(self, replica: int, lighthouse: str, *, min_replicas: int, timeout: timedelta) -> None:
        self._replica, self._lighthouse = replica, lighthouse
        self._min_replicas, self._limit = min_replicas, timeout
        self.host = address_toward(lighthouse)
        # A server that cannot be reached is an error here and now.
        self._store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
        self._server: Any = None
        self._client: Any = None
        self._group = open_group(CONNECT)
        self._group_id, self.rank, self.size = -1, 0, 1
        self.failures, self.closing = 0, False
        self._told = 0

    def say(self, text: str) -> None:
        """Print what happens to this replica."""
        print(f"replica {self._replica} {text}", file=sys.stderr, flush=True)

    def gather(self) -> None:
        """Wait until enough replicas have come, and form a process group of them."""
        while True:
            if self.closing:
                raise Closed("the assembly was closed")
            quorum = Quorum(self._client or self._start(), self.failures)
            if quorum.size >= self._min_replicas:
                break
            if quorum.size != self._told:
                self.say(
                    f"waits at {self._lighthouse}: {self._min_replicas} replicas are needed (min_replicas), "
                    f"{quorum.size} {'is' if quorum.size == 1 else 'are'} here"
                )
            self._told = quorum.size
            time.sleep(PAUSE)
        self._told = 0
        if quorum.id != self._group_id:
            self._group.configure(quorum.store, str(self._replica), quorum.rank, quorum.size, quorum.id)
            self._group_id = quorum.id
        self.rank, self.size = quorum.rank, quorum.size

    def _start(self) -> Any:
        """Let the lighthouse know this replica.

        Not before its first meeting: the others wait for every replica that the lighthouse hears of.
        """
        name = f"{self._replica}:{self._store.port}-{time.time_ns():x}"
        store = f"{_bracketed(self.host)}:{self._store.port}"
        try:
            self._server, self._client = start_server(name, self._lighthouse, self.host, store, CONNECT)
        except (RuntimeError, OSError) as error:
            raise NoLighthouse(
                f"no lighthouse answers at {self._lighthouse} ({_short(error)}): start one with torchft_lighthouse, or "
                "everything with python -m lightning_entropy.launch, and set TORCHFT_LIGHTHOUSE to its address"
            ) from error
        return self._client

    def records(self, own: Record) -> list[Record]:
        """Return the records of all that meet, by rank, for this replica's own."""
        text = json.dumps(own).encode().ljust(BYTES)
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        options = AllgatherOptions()
        options.timeout = CONNECT
        self._finish(self._group.allgather([all_], [mine], options))
        return [Record(*json.loads(bytes(record.tolist()))) for record in all_]

    def sum(self, payload: Tensor | None, rounding: Rounding | None, met: Met, subject: Subject) -> Tensor:
        """Return the sum of what the replicas send, of which some numbers may be rounded.

        Args:
            payload: of this replica; None: zeros, as it has come for another exchange.
            rounding: of its first numbers.
            met: gets what rounding leaves, and how many bytes were sent.
            subject: of the exchange.
        """
        _, size, wide, format, body = subject
        if payload is None:
            payload = torch.zeros(size, dtype=torch.float64 if wide else torch.float32)
        group = MeetingCollectives(self._group, self.size, self._limit, self._finish)
        if not body:
            group.all_reduce(payload).wait()
            met.bytes = payload.numel() * payload.element_size()
            return payload
        rounding = rounding or Rounding(format, body)
        first, rest = payload.split([body, size - body])
        group.all_reduce(rest).wait()
        total, met.left = rounding.sum(first, group, self.rank, whole=met.whole)
        met.bytes = rounding.payload + rest.numel() * rest.element_size()
        return torch.cat([total, rest])

    def send_common(self, source: int, common: Callable[[], dict[str, Any]] | None, version: int) -> Tensor:
        """Send what all have in common from the first that has it to those that have missed some of it.

        Args:
            source: the rank of the first that has it.
            common: returns it, there.
            version: of it.

        Returns:
            It, as bytes for ``torch.load``.
        """
        data = torch.zeros(0, dtype=torch.uint8)
        if self.rank == source:
            assert common is not None
            buffer = io.BytesIO()
            torch.save({"version": version, **common()}, buffer)
            data = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        options = BroadcastOptions()
        options.rootRank, options.timeout = source, self._limit
        self._finish(self._group.broadcast([length], options))
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._finish(self._group.broadcast([data], options))
        return data

    def _finish(self, work: Any) -> None:
        """Wait for a collective, but not for longer than the assembly is open."""
        nap = 0.0005
        while not work.is_completed():
            if self.closing:
                raise RuntimeError("the assembly was closed")
            time.sleep(nap)
            nap = min(1.5 * nap, 0.02)
        work.wait()

    def lose(self, error: Exception) -> None:
        """Go on without the result of a meeting that an error has ended."""
        self.failures += 1
        self.say(f"has lost a peer in a meeting and goes on without its result ({_short(error)})")
        # Others who wait for this one's numbers then know at once, and not at the end of their patience.
        self._group.abort(errored=False)
        self._group_id = -1

    def leave(self) -> None:
        """Let the lighthouse know nothing of this replica any more."""
        server, self._server, self._client = self._server, None, None
        if server is not None:
            server.shutdown()
        del server  # ends a request for a quorum that is still waiting

    def abort(self) -> None:
        """End the process group."""
        self._group.abort(errored=False)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _short(error: Exception) -> str:
    """Return the first line of an error, without half a word at its end; its class where it says nothing.

    Example:
        >>> _short(RuntimeError("a peer " * 40))[-12:], _short(OSError())
        ('r a peer ...', 'OSError')
    """
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else type(error).__name__
