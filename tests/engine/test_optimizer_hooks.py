"""A loop acts once in every step, whatever calls the step and however."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.optimizer_hooks import OptimizerHooks, has_foreign_hooks
from tests.engine.methods_table import METHODS, OPTIMIZERS, part
from tests.engine.training import (
    assert_equal,
    start,
    step,
    values,
)


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_an_exception_in_the_closure(method: str) -> None:
    net, optimizer, _ = start(OPTIMIZERS["sgd"], METHODS[method])
    clean, reference, _ = start(OPTIMIZERS["sgd"], METHODS[method])

    def broken() -> Tensor:
        raise OSError("no data")

    for i in range(7):
        if i in (0, 2, 3):
            before = values(net.parameters())
            with pytest.raises(OSError, match="no data"):
                optimizer.step(broken)
            assert_equal(before, net.parameters())
        step(net, optimizer, i, "positional")
        step(clean, reference, i, "positional")
    assert_equal(net.parameters(), clean.parameters())


class Loud(torch.optim.SGD):
    """Overrides step and calls the parent's: torch's hooks fire twice, once SGD itself has been instantiated."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Eager(torch.optim.SGD):
    """Evaluates the closure itself."""

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step()


@pytest.mark.parametrize("how", ["positional", "keyword", "none"])
@pytest.mark.parametrize("kind", [Loud, Eager])
@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_that_calls_its_parents_step_is_one_step(method: str, kind: Any, how: str) -> None:
    plain, reference, _ = start(OPTIMIZERS["sgd"], METHODS[method])
    net, optimizer, loop = start(part(kind, lr=0.1), METHODS[method])

    def broken() -> Tensor:
        raise OSError("no data")

    for i in range(7):
        step(plain, reference, i, how)
        step(net, optimizer, i, how)
        if i == 3:  # leaves both levels open
            with pytest.raises(OSError, match="no data"):
                optimizer.step(broken)
    assert_equal(net.parameters(), plain.parameters())
    assert (loop.outer_step, loop.inner_step) == divmod(7, METHODS[method].inner_steps)


def test_a_copied_or_pickled_optimizer_is_a_plain_one() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], METHODS["entropy_sgd"])
    step(net, optimizer, 0)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is torch.optim.SGD
        le.relax(copied, METHODS["entropy_sgd"])  # has no loop, so it can get one
        assert copied.state_dict().keys() == optimizer.state_dict().keys()
    assert (loop.outer_step, loop.inner_step) == (0, 1)
    both = copy.deepcopy((net, optimizer))
    step(both[0], both[1], 1)
    assert loop.inner_step == 1


def test_a_loaded_optimizer_keeps_its_loop() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], METHODS["lookahead"])
    step(net, optimizer, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 1)
    assert loop.inner_step == 2


def test_a_foreign_hook_stays() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["lookahead"])
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(loop.inner_step))
    step(net, optimizer, 0)
    loop.detach()
    step(net, optimizer, 1)
    assert seen == [1, 1]


def test_attaching_twice_is_refused_and_again_after_detach_is_not() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["lookahead"])
    with pytest.raises(ValueError, match="optimizer must have no loop yet"):
        le.relax(optimizer, METHODS["heat"])
    loop.detach()
    again = le.relax(optimizer, METHODS["lookahead"])
    step(net, optimizer, 0)
    assert again.inner_step == 1
    assert loop.inner_step == 0


# The hooks themselves


def recorded(optimizer: torch.optim.Optimizer) -> tuple[list[Any], OptimizerHooks]:
    events: list[Any] = []
    hooks = OptimizerHooks(
        optimizer,
        before=lambda: events.append("before"),
        before_closure=lambda: events.append("closure"),
        on_gradients=events.append,
        after=lambda: events.append("after"),
    )
    return events, hooks


def weight() -> torch.nn.Parameter:
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    return w


@pytest.mark.parametrize("kind", [torch.optim.SGD, Loud, Eager])
def test_the_order_of_a_step(kind: Any) -> None:
    torch.optim.SGD([weight()], lr=0.1)
    optimizer = kind([weight()], lr=0.1)
    events, hooks = recorded(optimizer)
    optimizer.step()
    assert events == ["before", True, "after"]
    events.clear()
    assert optimizer.step(lambda: events.append("loss")) is None
    assert events == ["before", "closure", "loss", True, "after"]
    events.clear()
    optimizer.step(closure=lambda: events.append("loss"))
    assert events == ["before", "closure", "loss", True, "after"]
    hooks.remove()
    hooks.remove()
    events.clear()
    optimizer.step()
    assert events == []


def test_a_closure_that_is_evaluated_again_says_so() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([w], max_iter=3)
    events, _ = recorded(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    for _ in range(2):
        events.clear()
        optimizer.step(closure)
        assert events == ["before", "closure", True, "closure", False, "closure", False, "after"]


def test_the_loss_of_the_closure_comes_back_and_its_gradients_are_taken_with_grad() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.1)
    recorded(optimizer)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True  # type: ignore[arg-type]


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_that_a_scaler_skips_within_the_optimizer(found: float) -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.1, fused=True)
    events, hooks = recorded(optimizer)
    assert hooks.grad_scale is None
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(4.0)
    optimizer.step()
    assert events == (["before"] if found else ["before", True, "after"])
    assert hooks.grad_scale == 4
    del optimizer.found_inf, optimizer.grad_scale
    events.clear()
    optimizer.step()
    assert events == ["before", True, "after"]


def test_steps_of_two_optimizers_within_each_other_are_each_seen() -> None:
    outer, inner = torch.optim.SGD([weight()], lr=0.1), torch.optim.SGD([weight()], lr=0.1)
    events, _ = recorded(outer)
    others, _ = recorded(inner)
    outer.step(lambda: inner.step())
    assert events == ["before", "closure", True, "after"]
    assert others == ["before", True, "after"]


def test_an_optimizer_without_hooks_is_refused() -> None:
    class NoHooks:
        pass

    with pytest.raises(TypeError, match="optimizer must run torch's step hooks, got NoHooks, which does not"):
        recorded(NoHooks())  # type: ignore[arg-type]


def test_hooks_of_others_are_told_from_a_loops() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.1)
    assert not has_foreign_hooks(optimizer)
    recorded(optimizer)
    assert not has_foreign_hooks(optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    assert has_foreign_hooks(optimizer)
    handle.remove()
    assert not has_foreign_hooks(optimizer)
