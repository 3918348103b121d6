"""What is shown and kept where a meeting was lost."""

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from tests.strategies.torchft.alone import Replica


def shown(replica: Replica) -> list[Tensor]:
    """Return the weights in a validation."""
    replica.loops.consensus.show(alone=False)
    values = [p.detach().clone() for p in replica.module.parameters()]
    replica.loops.consensus.hide()
    return values


@pytest.mark.parametrize(
    "method", [le.parle(inner_steps=4), le.diloco(inner_steps=4), le.elastic_sgd(inner_steps=4)], ids=str
)
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_a_replica_that_lost_its_peer_shows_its_own_anchor_and_trains_on(method: le.Relaxation, steps: int) -> None:
    replica = Replica(method)
    replica.assembly.loses = True
    replica.train(steps)
    anchors = [x.clone() for x in replica.loops.loops.loops[0].anchor]
    y = [p.detach().clone() for p in replica.module.parameters()]
    for value, x in zip(shown(replica), anchors, strict=True):
        assert torch.equal(value, x)
    for p, value in zip(replica.module.parameters(), y, strict=True):
        assert torch.equal(p, value) or steps % 4 == 0  # where the next loop has begun, y is x
    replica.assembly.loses = False
    before = replica.loops.loops.loops[0].outer_step
    replica.train(8)
    assert replica.loops.loops.loops[0].outer_step == before + 2
    assert all(value.isfinite().all() for value in shown(replica))


def test_the_mean_that_was_lost_is_not_shown_where_an_older_one_is_known() -> None:
    """Averages travel: the last mean that arrived is kept, and shown until the next one."""
    replica = Replica(le.parle(inner_steps=4, elastic_target="average"))
    replica.train(4)
    known = [mean.clone() for mean in replica.loops.couplings[0].last]
    assert known
    replica.assembly.loses = True
    replica.train(4)
    for value, mean in zip(shown(replica), known, strict=True):
        torch.testing.assert_close(value, mean, rtol=0, atol=0)
