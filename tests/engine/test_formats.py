"""A state says of which format it is, and a newer one is refused before anything has changed."""

import copy
import re
from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"gamma_start": 0.5, "measured": 0}, r'gamma="auto", which is gone and had measured 0.5 for outer step 1'),
        ({"gamma_start": None, "measured": 2}, 'gamma="auto", which is gone: write what gamma is to be'),
    ],
)
def test_a_gamma_that_was_measured_is_said_and_leaves_nothing(left: dict[str, Any], words: str) -> None:
    """Version 0.1 could, and summed the first loop's gradients for it."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["hamilton_jacobi"])
    for i in range(4):
        step(net, optimizer, i)
    state = through_a_file(loop.state_dict())
    old = copy.deepcopy(state) | left | {"format": 1}
    if left["measured"]:
        for name, slot in old["slots"].items():
            slot["gradient"] = torch.ones(loop.weights.by_name()[name].shape)
    other, other_optimizer, other_loop = start(OPTIMIZERS["sgd"], METHODS["hamilton_jacobi"], seed=9)
    with pytest.warns(UserWarning, match=words):
        other_loop.load_state_dict(old)
    found = through_a_file(other_loop.state_dict())
    assert found.keys() == state.keys()
    assert {name: slot.keys() for name, slot in found["slots"].items()} == {
        name: slot.keys() for name, slot in state["slots"].items()
    }
    for i in range(4, 8):
        step(net, optimizer, i)
        step(other, other_optimizer, i)
        assert_equal(other.parameters(), net.parameters())


WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    (("inner_step",), "3", "inner_step in .* must be an int >= 0, got '3'"),
    (("inner_step",), True, "inner_step in .* must be an int >= 0, got True"),
    (("outer_step",), -1, "outer_step in .* must be an int >= 0, got -1"),
    (("seed",), None, "seed in .* must be an int >= 0, got None"),
    (("slots",), [], r"slots in .* must be a dict of dicts, got \[\]"),
    (("slots", "0"), None, "slots in .* must be a dict of dicts"),
    (("slots", "0", "inner"), [1.0], r"inner in slots\['0'\] in .* must be a tensor, got \[1.0\]"),
    (("slots", "0", "average"), torch.ones(2), r"average of slots\['0'\] in .* the parameter's shape, .*, got \(2,\)"),
    (("slots", "0", "moved"), 1, r"moved in slots\['0'\] in .* must be a bool, got 1"),
    (("slots", "9"), {}, r"slots in .* must be of the parameters \['0', .*, got '9', which is not one"),
    (("outer",), {"options": []}, "outer in .* must be None, or a dict with options and state"),
    (("outer", "state"), {"0": 3}, "outer in .* must be None, or a dict with options and state"),
    (("outer", "options"), [{"betas": 1, "eps": 2}], "outer in .* must be of an optimizer with options .*'nesterov'"),
]
MISSING = [("inner_step",), ("seed",), ("slots",), ("outer",), ("slots", "0", "moved")]


def damaged(state: dict[str, Any], keys: tuple[Any, ...], *value: Any) -> dict[str, Any]:
    """Copy a state with another value, or without the key."""
    state = copy.deepcopy(state)
    *above, last = keys
    parent = state
    for key in above:
        parent = parent[key]
    if value:
        (parent[last],) = value
    else:
        del parent[last]
    return state


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [*[(k, (v,), m) for k, v, m in WRONG], *[(k, (), f"must have {k[-1]}, .*, got the keys") for k in MISSING]],
)
def test_a_loop_refuses_what_no_version_has_written_and_stays_as_it_is(keys: Any, value: Any, message: str) -> None:
    method = le.entropy_sgd(5, 0.5, 0.01, outer_momentum=0.5)
    net, optimizer, loop = start(OPTIMIZERS["sgd"], method)
    for i in range(8):  # into the second loop: every key has a value
        step(net, optimizer, i)
    state, before = loop.state_dict(), values(net.parameters())
    good = copy.deepcopy(state)
    with pytest.raises(ValueError, match=message):
        loop.load_state_dict(damaged(state, keys, *value))
    assert_equal(net.parameters(), before)
    assert (loop.inner_step, loop.outer_step) == (3, 1)
    unseen, reference, other = start(OPTIMIZERS["sgd"], method)
    for i in range(8):
        step(unseen, reference, i)
    other.load_state_dict(good)
    for i in range(8, 16):
        step(net, optimizer, i)
        step(unseen, reference, i)
        assert_equal(net.parameters(), unseen.parameters())


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_what_is_no_dict_is_refused(state: Any) -> None:
    _, _, loop = start(OPTIMIZERS["sgd"], le.Relaxation())
    with pytest.raises(ValueError, match=re.escape(f"state_dict of a loop must be a dict, got {state!r}")):
        loop.load_state_dict(state)


def test_a_schedule_that_cannot_go_on_from_a_state_leaves_the_loop_as_it_is() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.entropy_sgd(5, 0.5))
    for i in range(7):
        step(net, optimizer, i)
    state = copy.deepcopy(loop.state_dict())
    other, other_optimizer, other_loop = start(OPTIMIZERS["sgd"], le.entropy_sgd(5, lambda t: 0.5 - t))
    step(other, other_optimizer, 0)
    before = values(other.parameters())
    with pytest.raises(ValueError, match=r"gamma\(t=1\) must be"):
        other_loop.load_state_dict(state)
    assert_equal(other.parameters(), before)
    assert (other_loop.inner_step, other_loop.outer_step) == (1, 0)
