"""A state that one replica gives another, through a socket."""

import threading
import time
from typing import Any

import pytest
import torch

from lightning_entropy.strategies.torchft.transfer import StateServer


def test_who_waits_gets_the_state_as_it_was_offered_and_who_comes_later_gets_none() -> None:
    server = StateServer("127.0.0.1", 10.0)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(server.fetch(server.address, 3)))
    thread.start()
    while not server._waiting:
        time.sleep(0.01)
    state = {"x": torch.arange(5.0), "t": 7}
    server.offer(3, state)
    state["x"].zero_()  # training goes on
    server.withdraw()
    thread.join()
    assert got[0]["t"] == 7 and got[0]["x"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConnectionError, match="is not offered any more"):
        server.fetch(server.address, 3)
    with pytest.raises(ConnectionError):
        server.fetch(server.address, 2)
    server.close()
    with pytest.raises(ConnectionRefusedError):
        server.fetch(server.address, 3)


def test_a_state_that_does_not_come_in_time_is_an_error() -> None:
    server = StateServer("127.0.0.1", 0.3)
    with pytest.raises((TimeoutError, ConnectionError)):
        server.fetch(server.address, 1)
    server.close()
