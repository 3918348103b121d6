"""The outer optimizer, and the mean over replicas that it is fed with."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from tests.engine.methods_table import OPTIMIZERS
from tests.engine.training import Net, assert_equal, start, step, through_a_file, two_replicas, values


def test_parle_on_one_replica_is_the_loop_without_elasticity() -> None:
    ends = []
    for rho, mean in ((0.0, None), (0.5, None), (0.5, lambda tensors: [t.clone() for t in tensors])):
        net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], le.parle(3, 0.5, rho), replica_mean=mean)
        for i in range(10):
            step(net, optimizer, i)
        ends.append(values(loop.anchor))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def test_rho_one_forgets_all_but_the_loops_own_move() -> None:
    """x <- mean of the old anchors - (x - z): here the other replica stands at zero, so the mean is x / 2."""
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.elastic_sgd(2, 1.0), replica_mean=two_replicas)
    path = []
    for _ in range(4):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    assert path == [7, 2, 1, -1]  # 8 -> 7 -> 6 - 4 = 2; 2 -> 1 -> 0 - 1 = -1
    assert loop.outer_step == 2


def test_the_mean_of_the_anchors_starts_a_loop_ahead_and_is_waited_for_once() -> None:
    events: list[str] = []

    def replica_mean(tensors: list[Tensor]) -> Any:
        events.append("start")

        def wait() -> list[Tensor]:
            events.append("wait")
            return [t / 2 for t in tensors]

        return wait

    net, optimizer, _ = start(OPTIMIZERS["sgd"], le.elastic_sgd(3, 0.5), replica_mean=replica_mean)
    for i in range(7):
        step(net, optimizer, i)
        events.append(str(i))
    assert events == ["start", "0", "1", "wait", "2", "start", "3", "4", "wait", "5", "start", "6"]


@pytest.mark.parametrize("relaxation", [le.elastic_sgd(3, 0.5), le.parle(3, 0.5, 0.5), le.local_sgd(3), le.diloco(3)])
def test_a_parameter_unfrozen_in_the_middle_of_a_loop_with_replicas(relaxation: le.Relaxation) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.Relaxation())
    loop.detach()
    net.b.requires_grad_(False)
    loop = le.relax(optimizer, relaxation, replica_mean=two_replicas)
    for i in range(9):
        if i == 4:
            net.b.requires_grad_(True)
        step(net, optimizer, i)
    assert loop.outer_step == 3
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_the_outer_optimizer_may_be_any() -> None:
    for make in (OPTIMIZERS[n] for n in OPTIMIZERS if not n.startswith("lbfgs")):
        net, optimizer, loop = start(OPTIMIZERS["sgd"], le.lookahead(2), outer=make)
        for i in range(5):
            step(net, optimizer, i)
        assert loop.outer_step == 2
        assert not torch.equal(loop.anchor[0], Net().a)


def test_an_outer_optimizer_that_needs_a_closure_is_refused() -> None:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="outer must"):
        le.relax(optimizer, le.lookahead(2), outer=torch.optim.LBFGS)


def test_an_outer_momentum_of_another_library_is_a_float_in_the_state() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.hamilton_jacobi(2, outer_momentum=np.float64(0.9)))
    for i in range(3):
        step(net, optimizer, i)
    assert through_a_file(loop.state_dict())["outer"]["options"][0]["momentum"] == 0.9


def test_weights_loaded_with_replicas_are_not_pulled_to_the_mean_of_the_old_ones() -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], lr=0.0)
    loop = le.relax(optimizer, le.parle(2), replica_mean=lambda tensors: [t.clone() for t in tensors])
    for _ in range(3):
        w.grad = torch.ones(2)
        optimizer.step()
    with loop.at_anchor(), torch.no_grad():
        w.fill_(100.0)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(loop.anchor[0], torch.full((2,), 100.0))
