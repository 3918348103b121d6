"""What a replica that joins takes over of one that is training."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.torchft.assembly import Assembly, Met, Record


class Round:
    """A meeting of this replica alone, which is over at once."""

    def __init__(self, met: Met) -> None:
        self.met = met
        self.over = self

    def is_set(self) -> bool:
        return True

    def wait(self) -> Met:
        return self.met


class Alone:
    """Counts the meetings that are asked for."""

    present = (0,)

    def __init__(self) -> None:
        self.asked = 0

    def exchange(self, payload: Tensor, *, stream: int, version: int, common: Callable[[], Any]) -> Round:
        self.asked += 1
        record = Record(0, False, stream, payload.numel(), False, version, self.asked, "", 0)
        return Round(Met([record], 0, payload))


class Replica:
    def __init__(self, relaxation: le.Relaxation) -> None:
        torch.manual_seed(0)
        self.module, self.assembly = torch.nn.Linear(3, 2), Alone()
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1)
        self.loops = ReplicaLoops(
            self.module,
            [self.optimizer],
            relaxation,
            Grid(0, 1, 1),
            outer=None,
            seed=0,
            communication_dtype="float32",
            overlap=True,
            apart=False,
            timeout=None,
            meeting=cast(Any, None),
            assembly=cast(Assembly, self.assembly),
        )

    def train(self, steps: int) -> int:
        """Train; return the number of meetings that it has taken."""
        before = self.assembly.asked
        for _ in range(steps):
            self.loops.begin()
            self.optimizer.zero_grad()
            self.module(torch.ones(1, 3)).sum().backward()
            self.optimizer.step()
            self.loops.count(self.optimizer)
        return self.assembly.asked - before

    def show(self) -> None:
        """Show the consensus, as for a validation or a checkpoint."""
        self.loops.consensus.show(alone=False)
        self.loops.consensus.hide()


METHODS = {
    "anchor": le.parle(inner_steps=4),
    "average": le.parle(inner_steps=4, elastic_target="average"),
    "pseudo-gradient": le.diloco(inner_steps=4),
    "every step": le.parle(inner_steps=1),
}


@pytest.mark.parametrize("shown", [False, True], ids=["", "consensus shown"])
@pytest.mark.parametrize("steps", range(4, 9))
@pytest.mark.parametrize("method", METHODS)
def test_one_that_joins_has_as_many_meetings_before_it_as_the_one_whose_state_it_takes(
    method: str, steps: int, shown: bool
) -> None:
    giver, joiner = Replica(METHODS[method]), Replica(METHODS[method])
    giver.train(steps)
    if shown:
        giver.show()
    position = ReplicaLoops.position(giver.loops.state_dict())
    joiner.module.load_state_dict(giver.module.state_dict())
    joiner.loops.load_state_dict(position)
    for _ in range(9):
        assert giver.train(1) == joiner.train(1)


def test_replicas_may_have_inner_steps_of_their_own() -> None:
    """A slower one takes fewer between two meetings; one that joins in the middle of a longer loop ends it at once."""
    giver, joiner = Replica(le.parle(inner_steps=8)), Replica(le.parle(inner_steps=4))
    giver.train(6)
    joiner.loops.load_state_dict(ReplicaLoops.position(giver.loops.state_dict()))
    assert [joiner.train(1) for _ in range(10)] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert [giver.train(1) for _ in range(11)] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
