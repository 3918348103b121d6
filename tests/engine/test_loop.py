"""Counting steps, attaching and detaching, and a state from which the loop goes on exactly."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from tests.engine.methods_table import METHODS, OPTIMIZERS, part
from tests.engine.training import (
    Net,
    assert_equal,
    loss_of,
    start,
    step,
    step_without_zero,
    through_a_file,
    two_replicas,
    values,
)

NAN, INF = float("nan"), float("inf")


def test_a_step_without_any_gradient_is_none() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"])
    before = values(net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert (loop.outer_step, loop.inner_step) == (0, 0)
    assert_equal(net.parameters(), before)


def test_a_group_added_later_joins() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"])
    step(net, optimizer, 0)
    late = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    for i in range(1, 6):
        late.grad = torch.ones_like(late)
        step_without_zero(net, optimizer, i)
    assert len(loop.anchor) == 3
    assert late.mean() < 0
    loop.detach()
    assert_equal([*net.parameters(), late], loop.anchor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_without_a_scaler_a_bad_gradient_does_what_the_plain_optimizer_does(bad: float) -> None:
    net, optimizer, _ = start(OPTIMIZERS["sgd"], le.Relaxation())
    plain = Net()
    reference = OPTIMIZERS["sgd"](plain.parameters())
    for i in range(3):
        for model, opt in ((net, optimizer), (plain, reference)):
            opt.zero_grad()
            loss_of(model, i).backward()
            if i == 1:
                model.a.grad[0, 0] = bad
            opt.step()
        assert_equal(net.parameters(), plain.parameters())


@pytest.mark.parametrize("method", ["entropy_sgd", "hamilton_jacobi", "lookahead"])
def test_a_bad_gradient_that_the_user_takes_away_leaves_x_and_z_finite(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["adamw"], METHODS[method])
    for i in range(7):
        optimizer.zero_grad()
        (loss_of(net, i) * (float("nan") if i in (0, 3) else 1.0)).backward()
        if not all(torch.isfinite(p.grad).all() for p in net.parameters()):
            optimizer.zero_grad()
        optimizer.step()
    assert all(torch.isfinite(t).all() for t in [*loop.anchor, *loop.average, *net.parameters()])
    assert loop.outer_step * 3 + loop.inner_step == 5


def test_swa_utils_and_a_one_cycle_schedule_work_with_a_loop() -> None:
    net, optimizer, _ = start(OPTIMIZERS["sgd_momentum"], METHODS["entropy_sgd"])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(7):
            step(net, optimizer, i)
            scheduler.step()
    assert not caught


@pytest.mark.parametrize("method", METHODS)
def test_a_step_while_x_is_shown_is_an_error_that_harms_nothing(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    unseen, reference, _ = start(OPTIMIZERS["sgd"], METHODS[method])
    step(net, optimizer, 0)
    step(unseen, reference, 0)
    with loop.at_anchor():
        x = values(net.parameters())
        with pytest.raises(RuntimeError, match="leave at_anchor"):
            step(net, optimizer, 1)
        with pytest.raises(RuntimeError, match="leave at_anchor"):
            step(net, optimizer, 1, "positional")
        assert_equal(net.parameters(), x)
    for i in range(1, 5):
        step(net, optimizer, i)
        step(unseen, reference, i)
    assert_equal(net.parameters(), unseen.parameters())


@pytest.mark.parametrize("steps", [0, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_detach_leaves_x_and_no_hook(method: str, steps: int) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    for i in range(steps):
        step(net, optimizer, i)
    x = values(loop.anchor)
    loop.detach()
    loop.detach()
    assert_equal(net.parameters(), x)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    plain = Net()
    plain.load_state_dict(net.state_dict())
    reference = OPTIMIZERS["sgd"](plain.parameters())
    for i in range(3):
        step(net, optimizer, i)
        step(plain, reference, i)
    assert_equal(net.parameters(), plain.parameters())


Variant = tuple[le.Relaxation, str, dict[str, Any]]


STATES: dict[str, Variant] = {
    "entropy_sgd": (le.entropy_sgd(3, le.Scoping(0.5, 0.1), 1e-2), "sgd_momentum", {}),
    "entropy_sgd_adamw": (le.entropy_sgd(3, 0.5, 1e-2, reset_momentum=True), "adamw_fused", {}),
    "coupled": (le.entropy_sgd(3, 0.5, 1e-2, coupled=True), "sgd_nesterov_foreach", {}),
    "outer_momentum": (le.entropy_sgd(3, 0.5, 1e-2, outer_lr=0.5, outer_momentum=0.9), "sgd_momentum", {}),
    "outer_adam": (le.entropy_sgd(3, 0.5, 1e-2), "sgd", {"outer": part(torch.optim.Adam, lr=0.05)}),
    "pull": (le.hamilton_jacobi(4, le.Pull(0.5)), "sgd_momentum", {}),
    "two_timescale": (le.two_timescale(0.5, 1e-2), "sgd_momentum", {}),
    "average_without_reset": (le.Relaxation(inner_steps=3, gamma=0.5, average=0.5, reset=False), "sgd", {}),
    "heat": (le.heat(3, 1e2), "sgd_momentum", {}),
    "heat_filter": (le.heat(2, le.Widening(1e2, 2.0, 5), scale="filter"), "adamw", {}),
    "parle": (le.parle(3, 0.5, 0.25), "sgd_momentum", {"replica_mean": two_replicas}),
    "parle_code": (le.parle(3, 0.5, 0.25, elastic_target="average"), "sgd", {"replica_mean": two_replicas}),
    "diloco": (le.diloco(3), "adamw", {"replica_mean": two_replicas}),
    "streaming": (le.streaming_diloco(5, 2, 3), "adamw", {"replica_mean": two_replicas}),
    "streaming_alone": (le.streaming_diloco(4, 2, 2, 0.3), "sgd_momentum", {}),
    "rprop": (le.lookahead(3), "rprop", {}),
    "smoothed": (METHODS["smoothed"], "sgd_momentum", {}),
    "smoothed_filter": (METHODS["smoothed_filter"], "adamw", {}),
    "smoothed_parle": (
        le.Relaxation(inner_steps=3, gamma=0.5, average=0.25, rho=0.5, width=1e-2),
        "sgd_momentum",
        {"replica_mean": two_replicas},
    ),
}


@pytest.mark.parametrize("order", ["model first", "loop first", "model at x", "x in the model alone"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", STATES)
def test_going_on_from_a_file_is_exact_at_every_step(variant: str, dtype: torch.dtype, order: str) -> None:
    relaxation, name, options = STATES[variant]
    if dtype == torch.bfloat16 and name.endswith("fused"):
        return
    steps = 2 * relaxation.inner_steps + 1
    net, optimizer, loop = start(OPTIMIZERS[name], relaxation, dtype=dtype, **options)
    saved = []
    for i in range(steps + 3):
        at_x = {}
        if order in ("model at x", "x in the model alone"):
            with loop.at_anchor():
                at_x = copy.deepcopy(net.state_dict())
        saved.append(
            through_a_file(
                {
                    "model": at_x or net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loop": loop.state_dict(anchor=order != "x in the model alone"),
                }
            )
        )
        step(net, optimizer, i)
    end = values([*net.parameters(), *loop.anchor, *loop.average])
    for k, state in enumerate(saved):
        new = Net(5, dtype)
        new_optimizer = OPTIMIZERS[name](new.parameters())
        new_loop = le.relax(new_optimizer, relaxation, **{"seed": 8, **options})
        new_optimizer.load_state_dict(state["optimizer"])
        if order == "loop first":
            new_loop.load_state_dict(state["loop"])
            new.load_state_dict(state["model"])
        else:
            new.load_state_dict(state["model"])
            new_loop.load_state_dict(state["loop"])
        for i in range(k, steps + 3):
            step(new, new_optimizer, i)
        assert_equal([*new.parameters(), *new_loop.anchor, *new_loop.average], end)
        assert new_loop.settings == loop.settings


def test_a_parameter_that_moved_before_the_save_and_not_after_takes_its_outer_step() -> None:
    ends = []
    for resumed in (False, True):
        net, optimizer, loop = start(OPTIMIZERS["sgd"], le.lookahead(3))
        step(net, optimizer, 0)
        if resumed:
            state = through_a_file([net.state_dict(), loop.state_dict()])
            net, optimizer, loop = start(OPTIMIZERS["sgd"], le.lookahead(3), seed=5)
            net.load_state_dict(state[0])
            loop.load_state_dict(state[1])
        net.b.requires_grad_(False)
        optimizer.zero_grad()
        for i in (1, 2):
            step(net, optimizer, i)
        ends.append(values(loop.anchor))
    assert not torch.equal(ends[0][1], Net().b)
    assert_equal(*ends)


@pytest.mark.parametrize("variant", STATES)
def test_going_back_in_the_same_loop_is_exact(variant: str) -> None:
    relaxation, name, options = STATES[variant]
    net, optimizer, loop = start(OPTIMIZERS[name], relaxation, **options)
    for i in range(4):
        step(net, optimizer, i)
    state = through_a_file([net.state_dict(), optimizer.state_dict(), loop.state_dict()])
    ends = []
    for _ in range(2):
        for i in range(4, 12):
            step(net, optimizer, i)
        ends.append(values([*net.parameters(), *loop.anchor]))
        net.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
        loop.load_state_dict(state[2])
    assert_equal(*ends)


@pytest.mark.parametrize("variant", STATES)
def test_a_loaded_loop_shares_nothing_with_the_state(variant: str) -> None:
    relaxation, name, options = STATES[variant]
    net, optimizer, loop = start(OPTIMIZERS[name], relaxation, **options)
    for i in range(5):
        step(net, optimizer, i)
    state = loop.state_dict()
    kept = copy.deepcopy(state)
    other, other_optimizer, other_loop = start(OPTIMIZERS[name], relaxation, **options)
    other.load_state_dict(net.state_dict())
    other_loop.load_state_dict(state)
    for i in range(9):
        step(other, other_optimizer, i)
    assert state.keys() == kept.keys()
    for left, right in zip(_tensors(state), _tensors(kept), strict=True):
        assert_equal([left], [right])


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def test_loading_while_x_is_shown() -> None:
    for variant in ("entropy_sgd", "heat", "smoothed", "smoothed_filter", "smoothed_parle"):
        relaxation, name, options = STATES[variant]
        net, optimizer, loop = start(OPTIMIZERS[name], relaxation, **options)
        for i in range(4):
            step(net, optimizer, i)
        state = through_a_file([net.state_dict(), optimizer.state_dict(), loop.state_dict()])
        y, x = values(net.parameters()), values(loop.anchor)
        new, new_optimizer, new_loop = start(OPTIMIZERS[name], relaxation, seed=5, **options)
        with new_loop.at_anchor():
            new_optimizer.load_state_dict(state[1])
            new_loop.load_state_dict(state[2])
            assert_equal(new.parameters(), x)
        assert_equal(new.parameters(), y)


def test_state_of_other_parameters_is_refused() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"])
    step(net, optimizer, 0)
    w = torch.nn.Parameter(torch.ones(1, 1))
    small = le.relax(torch.optim.SGD([w], lr=0.1), METHODS["entropy_sgd"])
    state = loop.state_dict()
    state["slots"] = {"1": state["slots"]["1"]}
    with pytest.raises(ValueError, match="got '1', which is not one"):
        small.load_state_dict(state)
    state = loop.state_dict()
    del state["slots"]["1"]
    with pytest.raises(ValueError, match=r"'0'.* the parameter's shape, \(1, 1\), got \(4, 3\)"):
        small.load_state_dict(state)
    assert torch.equal(w, torch.ones(1, 1))


@pytest.mark.parametrize("bad", [-1.0, NAN, INF, None, "x", True])
@pytest.mark.parametrize("name", ["gamma", "noise", "average", "rho", "outer_lr"])
def test_a_schedule_that_turns_bad_stops_before_any_weight_changed(name: str, bad: Any) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=2, **{name: lambda t: 0.5 if t < 2 else bad}))
    for _ in range(4):
        w.grad = torch.ones(2)
        optimizer.step()
    before, momentum = w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()
    for _ in range(2):  # every time anew
        with pytest.raises((ValueError, TypeError), match=rf"^{name}\(t=2\) must be .*, got {bad!r}$"):
            optimizer.step()
    assert torch.equal(w, before)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], momentum)
    assert (loop.outer_step, loop.inner_step) == (2, 0)
