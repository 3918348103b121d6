"""Whoever waits for a meeting hears what it has brought, and for what it waits."""

import threading
from typing import Any

import pytest

from lightning_entropy.strategies.torchft import encounter
from lightning_entropy.strategies.torchft.encounter import Encounter
from lightning_entropy.strategies.torchft.records import Met, Record

RECORD = Record(0, False, 0, 3, False, "float32", 0, 0, -1, 1, "", 0)


class Place:
    """Counts what is asked of it; after some checks something happens."""

    def __init__(self, then: Any = lambda: None, after: int = 3) -> None:
        self.checks = self.explained = 0
        self.then, self.after = then, after

    def check(self) -> None:
        self.checks += 1
        if self.checks == self.after:
            self.then()

    def explain(self) -> None:
        self.explained += 1


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encounter, "TICK", 0.01)


def test_it_brings_what_has_met() -> None:
    task = Encounter(Place(), RECORD, None, None)
    assert not task.arrived and not task.look()
    task.met = Met([RECORD], 0)
    threading.Timer(0.05, task.over.set).start()
    assert task.wait() is task.met and task.arrived


def test_it_raises_what_has_ended_it() -> None:
    task = Encounter(Place(), RECORD, None, None)
    task.error = ValueError("replicas must train the same model")
    task.over.set()
    with pytest.raises(ValueError, match="the same model"):
        task.wait()


def test_what_should_not_wait_any_more_is_asked_again_and_again() -> None:
    def told() -> None:
        raise KeyboardInterrupt

    place = Place(told)
    with pytest.raises(KeyboardInterrupt):
        Encounter(place, RECORD, None, None).wait()
    assert place.checks == 3


def test_it_is_said_for_what_one_waits_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 10, 20, 40 and 80 seconds, of a clock of which a look takes five."""
    now = [0.0]
    monkeypatch.setattr(encounter.time, "monotonic", lambda: now[0])
    place = Place()
    task = Encounter(place, RECORD, None, None)
    said = []
    for _ in range(20):
        before = place.explained
        assert not task.look()
        said += [now[0]] * (place.explained - before)
        now[0] += 5
    assert said == [15, 25, 45, 85]
