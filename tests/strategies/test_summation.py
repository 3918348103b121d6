"""A sum over processes: what it calls, and in which order on which stream. Its values are test_exchange.py's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies.compression import BLOCK, EagerCodec
from lightning_entropy.strategies.summation import Sum


class Work:
    """A collective; what waits for it is the stream that is current."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait(self) -> None:
        self.log.append(f"{self.name} waited for on {STREAM[-1]}")

    def is_completed(self) -> bool:
        return False


class Group:
    """Two processes, of which the other gives zeros."""

    size = 2

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def _work(self, name: str) -> Work:
        self.log.append(f"{name} on {STREAM[-1]}")
        return Work(self.log, name)

    def all_reduce(self, values: Tensor) -> Work:
        return self._work("all_reduce")

    def all_to_all(self, received: Tensor, given: Tensor) -> Work:
        received.copy_(torch.zeros_like(given)).select(0, 0).copy_(given[0])
        return self._work("all_to_all")

    def all_gather(self, received: list[Tensor], given: Tensor) -> Work:
        for piece in received:
            piece.copy_(given)
        return self._work("all_gather")


class Stream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: str) -> None:
        self.log.append(f"aside waits for {other}")


STREAM = ["the current one"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called, with streams in the place of CUDA's."""
    found = list[str]()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        STREAM.append("aside")
        yield
        STREAM.pop()

    def record(self: Tensor, stream: Any) -> None:
        found.append(f"{self.dim()}-d memory is kept for {stream if isinstance(stream, str) else 'aside'}")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM[-1])
    monkeypatch.setattr(Tensor, "record_stream", record)
    return found


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_the_second_half_begins_aside_as_soon_as_the_first_is_done(log: list[str], format: Any) -> None:
    """All of it when the exchange begins; the current stream waits where the sum is used, for the end alone."""
    sum = Sum(torch.ones(2 * BLOCK), Group(log), EagerCodec(format), None, aside=Stream(log))  # type: ignore[arg-type]
    assert log == [
        "all_to_all on the current one",
        "2-d memory is kept for aside",
        "2-d memory is kept for aside",
        "aside waits for the current one",
        "all_to_all waited for on aside",
        "all_gather on aside",
    ]
    log.clear()
    sum.advance()
    assert not log and not sum.done
    assert (sum.result() == 1).all()
    assert log == ["all_gather waited for on the current one", "2-d memory is kept for the current one"]


def test_without_a_stream_it_begins_when_it_is_asked_for(log: list[str]) -> None:
    sum = Sum(torch.ones(2 * BLOCK), Group(log), EagerCodec("int8"), None)
    sum.progress()  # the first half has not arrived
    assert log == ["all_to_all on the current one"]
    sum.advance()
    assert log[1:] == ["all_to_all waited for on the current one", "all_gather on the current one"]
    assert (sum.result() == 1).all()


def test_one_half_has_no_second(log: list[str]) -> None:
    sum = Sum(torch.ones(3), Group(log), None, None, aside=Stream(log))  # type: ignore[arg-type]
    assert sum.result().tolist() == [1, 1, 1]
    assert log == ["all_reduce on the current one", "all_reduce waited for on the current one"]
