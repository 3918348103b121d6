"""A replica's state: exact when it goes on, before its loops were closed, and with the random numbers of its place."""

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_entropy as le
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.replica import replica_loops
from lightning_entropy.strategies.replica_state import ReplicaState

OPTIONS = ReplicaOptions(le.parle(3, 0.1, 0.3, 0.25), 1, "all", False, None, None, "float32", True)


class Module(torch.nn.Linear):
    """Stands for a LightningModule in the middle of an epoch, or at its end."""

    def __init__(self, *, last: bool = False) -> None:
        super().__init__(3, 2)
        self.trainer = SimpleNamespace(is_last_batch=last)


class Fit:
    def __init__(self, *, last: bool = False, options: ReplicaOptions = OPTIONS) -> None:
        torch.manual_seed(0)
        self.module: Any = Module(last=last)
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1, momentum=0.9)
        none = cast(Any, None)
        self.loops = replica_loops(
            self.module, [self.optimizer], options, Grid(0, 1, 1), seed=0, timeout=None, meeting=none
        )
        self.state = ReplicaState(options)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.state.begin_batch(self.loops)
            self.loops.begin()
            self.optimizer.zero_grad()
            self.module(torch.ones(1, 3)).square().sum().backward()
            self.optimizer.step()
            self.loops.count(self.optimizer)

    @property
    def now(self) -> dict[str, Any]:
        state = self.state.now(self.loops, self.module)
        assert state is not None
        return copy.deepcopy(state)

    @property
    def weights(self) -> list[list[float]]:
        return [p.tolist() for p in self.module.parameters()]


def resumed(fit: Fit, *, last: bool = False) -> Fit:
    """Return another fit that goes on from the state of one."""
    again, state = Fit(last=last), fit.now
    again.module.load_state_dict(fit.loops.consensus.fill(fit.module.state_dict(), alone=False))
    again.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
    again.state.load(state)
    again.state.restore(again.loops, again.module)
    assert again.state.resumed and again.state.restored is None
    return again


def test_another_goes_on_as_if_nothing_had_been() -> None:
    fit = Fit()
    fit.train(4)
    again = resumed(fit)
    for one in (fit, again):
        one.train(4)
    assert fit.weights == again.weights


def test_loops_that_were_closed_are_saved_open_and_go_on_open() -> None:
    fit, undisturbed = Fit(), Fit()
    for one in (fit, undisturbed):
        one.train(4)
    before = fit.now
    assert not fit.state.close(fit.loops, fit.module)  # x was not shown
    assert fit.loops.loops.loops[0].outer_step == 2
    after = fit.now
    assert [before["loops"][0][key] for key in ("inner_step", "outer_step")] == [1, 1]
    assert [after["loops"][0][key] for key in ("inner_step", "outer_step")] == [1, 1]
    assert not fit.state.close(fit.loops, fit.module)  # again, which changes nothing
    for one in (fit, undisturbed):
        one.train(3)
    assert fit.weights == undisturbed.weights


def test_who_has_shown_x_hears_that_it_is_hidden_by_closing() -> None:
    fit = Fit()
    fit.train(4)
    fit.loops.consensus.show(alone=False)
    assert fit.state.close(fit.loops, fit.module)


def test_at_an_outer_step_there_is_nothing_to_close() -> None:
    fit = Fit()
    fit.train(3)
    before = fit.weights
    assert not fit.state.close(fit.loops, fit.module)
    assert fit.weights == before and fit.loops.loops.loops[0].outer_step == 1


def test_what_has_ended_can_be_saved_still() -> None:
    fit = Fit()
    assert fit.state.now(None, fit.module) is None
    fit.train(2)
    fit.state.leave(fit.loops, fit.module)
    fit.loops.detach(close=True)
    left = fit.state.now(None, fit.module)
    assert left is not None and left["loops"][0]["inner_step"] == 2
    assert left["parameters"] == [["weight", "bias"]] and left["optimizers"] == ["SGD"]


def draw() -> float:
    return torch.rand(()).item()


@pytest.mark.parametrize("last", [False, True])
def test_the_random_state_is_that_of_the_place(last: bool) -> None:
    """In an epoch at once; at its end after the iterator of the next one, unless a batch has begun."""
    fit = Fit(last=last)
    fit.train(2)
    state = fit.now
    expected = draw()
    torch.manual_seed(5)
    at_once = draw()
    torch.manual_seed(5)
    again = Fit(last=last)
    torch.manual_seed(5)
    again.state.load(state)
    again.state.restore(again.loops, again.module)
    assert draw() == (at_once if last else expected)
    again.state.end_epoch()
    assert (draw() == expected) == last
    torch.manual_seed(5)
    again.state.end_epoch()
    assert draw() == at_once  # once is enough


def test_a_batch_that_begins_has_its_own_random_state() -> None:
    fit = Fit(last=True)
    fit.train(2)
    again = resumed(fit, last=True)
    again.train(1)
    torch.manual_seed(5)
    expected = draw()
    torch.manual_seed(5)
    again.state.end_epoch()
    assert draw() == expected


def test_another_method_is_said() -> None:
    fit = Fit()
    fit.train(1)
    other = ReplicaState(ReplicaOptions(le.parle(3, 0.1, 0.5, 0.25), 1, "all", False, None, None, "float32", True))
    other.load(fit.now)
    with pytest.warns(UserWarning, match="rho was 0.3, is 0.5"):
        other.restore(Fit().loops, fit.module)


class Picky(torch.optim.Adam):
    def load_state_dict(self, state_dict: Any) -> None:
        raise KeyError("exp_avg")


def test_an_optimizer_that_cannot_load_its_state_is_refused() -> None:
    fit = Fit()
    fit.train(1)
    own, picky = ReplicaState(OPTIONS), Picky(fit.module.parameters())
    own.check_optimizers([picky], [fit.optimizer.state_dict()])  # without a checkpoint nothing is known
    own.load(fit.now)
    with pytest.raises(MisconfigurationException, match=r"optimizer 0 must be SGD .* got Picky"):
        own.check_optimizers([picky], [fit.optimizer.state_dict()])
