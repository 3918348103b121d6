"""A state says of which format it is, and a newer one is refused before anything has changed."""

import copy
import re
from typing import Any

import pytest

import lightning_entropy as le
from lightning_entropy.engine.formats import check_format
from lightning_entropy.engine.loop import FORMAT
from tests.engine.methods_table import METHODS, OPTIMIZERS
from tests.engine.training import assert_equal, start, step, through_a_file, values


def test_a_state_without_a_format_is_of_the_first() -> None:
    assert check_format("state_dict", {}, 3) == 1
    assert check_format("state_dict", {"format": 2}, 3) == 2
    assert check_format("state_dict", {"format": 3}, 3) == 3


@pytest.mark.parametrize("found", [3, 99, "2", None, 1.0])
def test_what_is_not_known_is_refused_with_both_formats(found: Any) -> None:
    message = f"the state must be of format 2 or older, got format {found!r}: load it with"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_format("the state", {"format": found}, 2)


def test_a_loop_says_its_format() -> None:
    _, _, loop = start(OPTIMIZERS["sgd"], le.Relaxation())
    assert through_a_file(loop.state_dict())["format"] == FORMAT


@pytest.mark.parametrize("method", ["entropy_sgd", "heat", "smoothed"])
def test_a_loop_refuses_a_newer_state_and_stays_as_it_is(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    unseen, reference, _ = start(OPTIMIZERS["sgd"], METHODS[method])
    for i in range(8):
        if i == 4:
            state = copy.deepcopy(loop.state_dict()) | {"format": 99, "outer_step": 7}
            before = values(net.parameters())
            with pytest.raises(ValueError, match=rf"state_dict of a loop must be of format {FORMAT} .*, got format 99"):
                loop.load_state_dict(state)
            assert_equal(net.parameters(), before)
        step(net, optimizer, i)
        step(unseen, reference, i)
        assert_equal(net.parameters(), unseen.parameters())


@pytest.mark.parametrize("method", ["entropy_sgd", "heat", "smoothed"])
def test_a_loop_goes_on_from_a_state_without_a_format(method: str) -> None:
    """Version 0.1 wrote none."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    for i in range(4):
        step(net, optimizer, i)
    state = through_a_file(loop.state_dict())
    del state["format"]
    other, other_optimizer, other_loop = start(OPTIMIZERS["sgd"], METHODS[method], seed=9)
    other_loop.load_state_dict(state)
    for i in range(4, 8):
        step(net, optimizer, i)
        step(other, other_optimizer, i)
        assert_equal([*other.parameters(), *other_loop.anchor], [*net.parameters(), *loop.anchor])
