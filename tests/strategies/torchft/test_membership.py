"""Replicas that come and go: who writes, what is given to one that comes, and what a checkpoint has for any number."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

import lightning_entropy as le
from lightning_entropy.strategies.membership import members
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.save import Save
from lightning_entropy.strategies.torchft.join import PEER
from tests.strategies.torchft.alone import Replica

pytest.importorskip("torchft")

from lightning_entropy.strategies.torchft.membership import TorchftMembership

OPTIONS = ReplicaOptions(le.parle(), "auto", "all", False, None, None, "float32", True, membership="torchft")


class Meeting:
    """Stands for an assembly of replicas 1 and 3, at which one waits for a state, or none does."""

    present = (3, 1)

    def __init__(self, *, waits: bool = False) -> None:
        self.wants_state, self.asked, self.open = waits, 0, True
        self.given: list[dict[str, Any]] = []

    def asks(self) -> bool:
        self.asked += 1
        return self.wants_state

    def give_state(self, state: dict[str, Any]) -> None:
        self.given.append(state)

    def close(self) -> None:
        self.open = False


def membership(assembly: Meeting | None = None) -> TorchftMembership:
    own = TorchftMembership(OPTIONS)
    own.assembly = cast(Any, assembly)
    return own


def save(path: Any) -> Save:
    content = {"state_dict": {"w": torch.ones(2)}, "global_step": 7, "optimizer_states": []}
    return Save(TorchCheckpointIO(), content, content, path, None, alone=False, sharded=False)


def trained(steps: int) -> dict[str, Any]:
    replica = Replica(le.parle(inner_steps=4))
    replica.train(steps)
    return replica.loops.state_dict()


def test_it_is_what_torchft_names_and_waits_a_minute_unless_the_user_says() -> None:
    assert type(members(OPTIONS)) is TorchftMembership
    for given, seconds in ({}, 60), ({"timeout": le.strategies.torchft.membership.SILENCE / 2}, 30):
        strategy = le.ElasticEntropyStrategy(membership="torchft", **given)
        assert strategy._timeout.total_seconds() == seconds
    assert le.ElasticEntropyStrategy()._timeout.total_seconds() > 60  # Lightning's own


@pytest.mark.parametrize(("first", "rank", "writes"), [(1, 0, True), (1, 1, False), (3, 0, False), (0, 0, False)])
def test_the_first_process_of_the_first_that_is_there_writes(first: int, rank: int, writes: bool) -> None:
    assert membership(Meeting()).writes(Grid(rank, 2, 1, first)) == writes


def test_before_and_after_a_fit_replica_0_writes() -> None:
    assert [membership().writes(Grid(0, 1, 1, number)) for number in range(2)] == [True, False]


def test_a_checkpoint_is_for_any_number_of_replicas_and_written_by_one(tmp_path: Path) -> None:
    path, state = tmp_path / "at.ckpt", trained(9)
    membership(Meeting()).save(save(path), Grid(0, 1, 1, 3), state)
    assert not path.exists()
    membership(Meeting()).save(save(path), Grid(0, 1, 1, 1), state)
    assert [file.name for file in tmp_path.iterdir()] == ["at.ckpt"]
    checkpoint = torch.load(path, weights_only=True)
    restored = membership().load(checkpoint, path, cast(Any, None), Grid(0, 1, 1), True)
    assert restored is not None and restored["counters"][0]["outer_step"] == 2  # of 4 steps each
    assert set(checkpoint) == {"state_dict", "global_step", "optimizer_states"}


def test_a_checkpoint_without_us_has_weights_alone() -> None:
    assert membership().load({"state_dict": {}}, "at.ckpt", cast(Any, None), Grid(0, 1, 1), True) is None


def test_one_that_comes_is_given_the_checkpoint_and_the_position_by_whoever_is_asked(tmp_path: Path) -> None:
    """Also by one that writes no files."""
    meeting, state = Meeting(), trained(6)
    asked = replace(save(PEER), path=PEER)
    membership(meeting).save(asked, Grid(0, 1, 1, 3), state)
    (given,) = meeting.given
    assert given["checkpoint"] is asked.content
    assert given["position"]["counters"][0]["inner_step"] == 2
    assert given["position"].keys() == ReplicaLoops.position(state).keys()


class Calls:
    """Stands for the loops and for the Trainer."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def receive(self) -> None:
        self.made.append("received")

    def save_checkpoint(self, path: str) -> None:
        self.made.append(path)


@pytest.mark.parametrize(
    ("waits", "now", "made"), [(True, True, ["received", PEER]), (True, False, []), (False, True, [])]
)
def test_a_state_is_given_where_one_waits_and_what_has_arrived_is_in_it(
    waits: bool, now: bool, made: list[str]
) -> None:
    calls: Any = Calls()
    meeting = Meeting(waits=waits)
    own = membership(meeting)
    own.give_state(calls, calls, now=now)
    own.give_state(None, calls)  # before the loops are there
    assert calls.made == made and own.wants_state == waits
    assert meeting.asked == 1  # which the ranks of a replica do together, and learn of it


def test_the_checkpoint_of_another_is_what_is_loaded_until_training_begins() -> None:
    strategy = le.ElasticEntropyStrategy(membership="torchft")
    own = cast(TorchftMembership, strategy._members)
    own.given = {"global_step": 5}
    assert strategy.load_checkpoint("there is no such file") == {"global_step": 5}
    own.begin(5)
    assert own.given is None


def test_leaving_ends_the_meetings() -> None:
    meeting = Meeting()
    own = membership(meeting)
    own.leave()
    own.leave()
    assert not meeting.open and own.assembly is None and not own.wants_state


class Gone(TorchCheckpointIO):
    def remove_checkpoint(self, path: Any) -> None:
        raise FileNotFoundError(path)


def test_a_file_that_another_replica_has_removed_is_no_error() -> None:
    membership().remove(Gone(), "last.ckpt")
