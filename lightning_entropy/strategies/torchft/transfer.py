"""How a replica that joins gets the state of one that is there."""

import io
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

import torch

HEADER = struct.Struct("!q")  # the number of a state that is asked for, and then the bytes of it that follow


class StateServer:
    """Offers this replica's state to those that ask for it by number, and fetches others'.

    torchft's own transport does as much, but listens on every interface under a name that others need not know, and
    serves the tensors themselves, which the training changes meanwhile on the CPU. What is fetched is unpickled: as
    torchft's other servers, this one belongs into a network whose members trust each other.

    Args:
        host: this machine's address, as the others reach it.
        timeout: in seconds; of a transfer that stands still, and of waiting for one to begin.

    Attributes:
        address: for :meth:`fetch`.
    """

    def __init__(self, host: str, timeout: float) -> None:
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._limit = timeout
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._changed = threading.Condition()
        self._serial, self._state = -1, b""
        self._waiting: dict[int, list[list[bytes]]] = {}  # by number: what those that wait for it are to get
        self._serving: list[threading.Thread] = []
        threading.Thread(target=self._listen, name="state server", daemon=True).start()

    def offer(self, serial: int, state: dict[str, Any]) -> None:
        """Offer a state, as it is now, under a number larger than any before, until :meth:`withdraw`."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with self._changed:
            self._serial, self._state = serial, buffer.getvalue()
            for given in self._waiting.pop(serial, []):
                given.append(self._state)
            self._changed.notify_all()

    def withdraw(self) -> None:
        """Forget the state; who asks for it from now on gets none."""
        with self._changed:
            self._state = b""

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._serving = [thread for thread in self._serving if thread.is_alive()]
            self._serving.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self._serving[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(self._limit)
            (serial,) = HEADER.unpack(receive(connection, HEADER.size))
            state = self._wait_for(serial)
            connection.sendall(HEADER.pack(len(state)))
            connection.sendall(state)

    def _wait_for(self, serial: int) -> bytes:
        with self._changed:
            if self._serial >= serial:
                return self._state if self._serial == serial else b""
            given: list[bytes] = []
            self._waiting.setdefault(serial, []).append(given)
            self._changed.wait_for(lambda: bool(given), self._limit)
            return given[0] if given else b""

    def fetch(self, address: tuple[str, int], serial: int) -> dict[str, Any]:
        """Return the state that another replica offers under a number, as soon as it does.

        Raises:
            OSError: it is gone, or does not offer it any more.
        """
        with socket.create_connection(address, self._limit) as connection:
            connection.sendall(HEADER.pack(serial))
            (size,) = HEADER.unpack(receive(connection, HEADER.size))
            if not size:
                raise ConnectionError("the state is not offered any more")
            data = receive(connection, size)
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return state

    def close(self) -> None:
        """Stop listening, when the transfers of what is offered are done."""
        if self._state:
            for thread in self._serving:
                thread.join(self._limit)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or accept() would wait for ever
        self._listener.close()


def receive(connection: socket.socket, size: int) -> bytearray:
    """Return so many bytes of a connection.

    Raises:
        ConnectionError: it has ended before.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionError("the other replica has ended the transfer")
        view = view[got:]
    return data
