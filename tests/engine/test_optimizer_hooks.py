"""A loop acts once in every step, whatever calls the step and however."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
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
