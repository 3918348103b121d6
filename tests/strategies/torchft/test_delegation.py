"""A replica of two ranks, of which the first goes to meetings."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.encounter import Encounter
from lightning_entropy.strategies.torchft.exchange import ElasticCoupling
from lightning_entropy.strategies.torchft.records import Met, Record
from tests.strategies.runs import external

pytestmark = pytest.mark.processes

RECORDS = [Record(replica, False, 0, 3, False, "float32", 0, 0, -1, 1, "", 0) for replica in (4, 7)]


class Meetings:
    """Stands for the assembly of the first rank: every meeting is over after some time, with what ``play`` does."""

    wants_state = True

    def __init__(self, play: Callable[[Encounter], None], seconds: float = 0.0) -> None:
        self.play, self.seconds = play, seconds
        self.given: list[Any] = []

    def exchange(self, payload: torch.Tensor, **_: Any) -> Encounter:
        encounter = Encounter(cast(Assembly, self), RECORDS[0], payload, None)

        def over() -> None:
            time.sleep(self.seconds)
            self.play(encounter)
            encounter.over.set()

        threading.Thread(target=over).start()
        return encounter

    def explain(self) -> None: ...

    def give_state(self, state: dict[str, Any]) -> None:
        self.given.append(state)

    def take_state(self, met: Met) -> dict[str, Any]:
        time.sleep(self.seconds)
        if self.seconds:
            raise ConnectionError("the other replica has ended the transfer")
        return {"x": torch.ones(2), "from": met.records[0].replica}


def two(folder: Path, work: Callable[[Delegation, Meetings], Any], play: Any = None, seconds: float = 0.0) -> list[Any]:
    """Return what ``work`` returns on the two ranks of a job."""

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=number, world_size=2, timeout=timedelta(seconds=20))
        meetings = Meetings(play or (lambda encounter: None), seconds)
        assembly = cast(Assembly, meetings) if number == 0 else None
        delegation = Delegation(
            assembly, check=lambda: None, meeting=lambda where: nullcontext(), timeout=timedelta(seconds=20)
        )
        torch.save(work(delegation, meetings), folder / f"{number}.pt")

    assert external(2, rank) == ["", ""]
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2)]


def bring(records: list[Record]) -> Callable[[Encounter], None]:
    """Let a meeting of these replicas bring twice what this one has sent."""

    def play(encounter: Encounter) -> None:
        encounter.met = Met(records, 0, None if encounter.payload is None else 2 * encounter.payload, bytes=12)

    return play


def test_both_ranks_get_what_the_first_brings(tmp_path: Path) -> None:
    def work(delegation: Delegation, _: Meetings) -> Any:
        coupling = ElasticCoupling(cast(Any, delegation), 0)
        rank = dist.get_rank()
        meet = coupling([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
        assert coupling.round is not None
        before = coupling.round.arrived
        means = [m.tolist() for m in meet() or []]
        return means, before, coupling.round.arrived, delegation.present, coupling.sent > 0, rank

    first, second = two(tmp_path, work, bring(RECORDS))
    # The sum of twice the payload, over twice the count.
    assert first == ([[1.0, 2.0], [3.0]], False, True, [4, 7], True, 0)
    assert second == ([[1.0, 2.0], [3.0]], False, True, [4, 7], False, 1)


def test_a_nan_of_one_rank_leaves_out_the_replica(tmp_path: Path) -> None:
    def play(encounter: Encounter) -> None:
        assert encounter.payload is not None
        others = torch.tensor([5.0, 6.0, 1.0, 0.0])  # two values, their count, a distance
        encounter.met = Met(RECORDS, 0, encounter.payload + others)

    def work(delegation: Delegation, _: Meetings) -> Any:
        coupling = ElasticCoupling(cast(Any, delegation), 0)
        means = coupling([torch.tensor([1.0, float("nan") if dist.get_rank() else 2.0])])()
        assert means is not None and coupling.round is not None
        return means[0].tolist(), coupling.round.finite

    assert two(tmp_path, work, play) == [([5.0, 6.0], False)] * 2


def test_a_lost_meeting_and_an_error_are_of_both_ranks(tmp_path: Path) -> None:
    def another_model(encounter: Encounter) -> None:
        encounter.error = ValueError("replicas must train the same model")

    def work(delegation: Delegation, meetings: Meetings) -> Any:
        lost = ElasticCoupling(cast(Any, delegation), 0)([torch.ones(3)])()
        meetings.play = another_model
        with pytest.raises(ValueError, match="replicas must train the same model"):
            ElasticCoupling(cast(Any, delegation), 0)([torch.ones(3)])()
        return lost

    assert two(tmp_path, work) == [None, None]


def test_the_ranks_wait_together_and_can_be_told_to_end(tmp_path: Path) -> None:
    def work(delegation: Delegation, _: Meetings) -> Any:
        asked = []

        def check() -> None:
            asked.append(1)
            if delegation.agree([dist.get_rank() == 1 and len(asked) == 2])[0]:  # only the second has been told
                raise KeyboardInterrupt

        delegation._check = check
        with pytest.raises(KeyboardInterrupt):
            delegation.exchange(torch.ones(3) if delegation.speaks else None).wait()
        return len(asked)

    assert two(tmp_path, work, bring(RECORDS), seconds=6.0) == [2, 2]


def test_a_state_is_given_and_taken_by_the_first_and_known_to_both(tmp_path: Path) -> None:
    def work(delegation: Delegation, meetings: Meetings) -> Any:
        before = delegation.wants_state
        asks = delegation.asks()
        delegation.give_state({"t": 3})
        after = delegation.wants_state
        state = delegation.take_state(Met(RECORDS, 0))
        meetings.seconds = 1.5
        with pytest.raises(ConnectionError):
            delegation.take_state(Met(RECORDS, 0))
        return before, asks, after, meetings.given, state["x"].tolist(), state["from"]

    expected = (False, True, False)
    first, second = two(tmp_path, work)
    assert first == (*expected, [{"t": 3}], [1.0, 1.0], 4)
    assert second == (*expected, [], [1.0, 1.0], 4)


def test_ranks_that_have_found_different_checkpoints_are_refused(tmp_path: Path) -> None:
    def work(delegation: Delegation, _: Meetings) -> Any:
        delegation.check_start(40)
        with pytest.raises(MisconfigurationException, match="got one of step 0 on rank 0 and another elsewhere"):
            delegation.check_start(40 * dist.get_rank())
        return True

    assert two(tmp_path, work) == [True, True]
