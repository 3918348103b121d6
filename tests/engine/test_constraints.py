"""Which weights somebody has written between two steps."""

import torch

from lightning_entropy.engine.constraints import Constraints
from lightning_entropy.engine.weights import Weights
from tests.engine.training import Net


def made(*, watched: bool = True) -> tuple[Net, Constraints]:
    net = Net()
    weights = Weights(torch.optim.SGD(net.parameters(), lr=0.1))
    for p in net.parameters():
        weights.track(p)
    return net, Constraints(weights, watched=watched)


@torch.no_grad()
def test_a_weight_written_after_a_step_is_kept_as_it_is_now() -> None:
    net, constraints = made()
    net.b.mul_(2.0)
    constraints.watch()
    net.a.clamp_(max=0.0)
    ((weight, value),) = constraints.kept()
    assert weight.param is net.a and torch.equal(value, net.a)
    net.a.add_(1.0)  # by the loop
    assert not torch.equal(value, net.a)


@torch.no_grad()
def test_what_the_loop_writes_after_a_note_does_not_count() -> None:
    net, constraints = made()
    constraints.watch()
    net.a.clamp_(max=0.0)
    constraints.note()
    net.b.zero_()
    assert [weight.param is net.a for weight, _ in constraints.kept()] == [True]


@torch.no_grad()
def test_nothing_is_kept_before_a_step_after_forget_and_unwatched() -> None:
    net, constraints = made()
    net.a.zero_()
    assert constraints.kept() == []
    constraints.watch()
    net.a.add_(1.0)
    constraints.forget()
    assert constraints.kept() == []
    net, constraints = made(watched=False)
    constraints.watch()
    net.a.zero_()
    assert constraints.kept() == []
