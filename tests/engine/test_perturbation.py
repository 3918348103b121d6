"""Gradients at perturbed weights: alone and inside a chain."""

import pytest
import torch

import lightning_entropy as le
from tests.engine.methods_table import OPTIMIZERS
from tests.engine.training import assert_equal, loss_of, start, step, values

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_write_into_perturbed_weights_is_an_error_that_leaves_x(inner_steps: int) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(inner_steps, 100.0))
    step(net, optimizer, 0)
    x = values(loop.anchor)
    with torch.no_grad():
        net.b.clamp_(-1e-3, 1e-3)
    loss_of(net, 1).backward()
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"):
        optimizer.step()
    assert_equal(net.parameters(), x)
    step(net, optimizer, 1)
    with loop.at_anchor(), torch.no_grad():
        net.b.zero_()
    assert loop.anchor[1].abs().max() == 0


def test_looking_at_perturbed_weights_that_were_written_is_the_error_too() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(1, 100.0))
    step(net, optimizer, 0)
    x = values(loop.anchor)
    with torch.no_grad():
        net.b.zero_()
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"), loop.at_anchor():
        pass
    assert_equal(net.parameters(), x)
    step(net, optimizer, 1)


def test_a_parameter_frozen_while_it_is_perturbed_is_no_write() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(1, 100.0))
    step(net, optimizer, 0)
    with torch.no_grad():
        net.b.add_(0)
    net.b.requires_grad_(False)
    loss_of(net, 1).backward()
    optimizer.step()
    with loop.at_anchor():
        assert torch.equal(net.b, loop.anchor[1])


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_a_heat_schedule_that_turns_bad_leaves_x(bad: float) -> None:
    """y of step t is drawn when step t - 1 ends, so there it is met: with step t - 1 done and x in the parameters."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    loop = le.relax(optimizer, le.heat(gamma=lambda t: 1e4 if t < 1 else bad))
    loop.begin()
    w.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^gamma\(t=1\) must be a finite number > 0 .*, got {bad}$"):
            optimizer.step()
    assert torch.equal(w, torch.tensor([0.5, 1.5]))
