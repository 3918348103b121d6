"""What a replica that joins takes over of one that is training."""

import pytest

import lightning_entropy as le
from lightning_entropy.strategies.replica import ReplicaLoops
from tests.strategies.torchft.alone import Replica

METHODS = {
    "anchor": le.parle(inner_steps=4),
    "average": le.parle(inner_steps=4, elastic_target="average"),
    "pseudo-gradient": le.diloco(inner_steps=4),
    "every step": le.parle(inner_steps=1),
    "streaming": le.streaming_diloco(4, 2, 1),
    "streaming, two on their way": le.streaming_diloco(4, 2, 3),
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
