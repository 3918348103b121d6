"""What the engine promises for every method with every optimizer."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from tests.engine.methods_table import METHODS, OPTIMIZERS, TABLE, exported_presets, part, usable
from tests.engine.training import (
    Net,
    assert_equal,
    closure_of,
    draws,
    loss_of,
    perturbations,
    start,
    step,
    through_a_file,
    values,
)
from tests.reference import filter_norms, relative_scales


def test_every_exported_preset_is_in_the_table() -> None:
    """A new preset needs a row, with which every test of the contract runs."""
    assert set(TABLE) == {"Relaxation", *exported_presets()}
    assert all(TABLE.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_optimizer(name: str, method: str) -> None:
    make, relaxation, steps = OPTIMIZERS[name], METHODS[method], 7
    if not usable(name, relaxation):
        return
    kind, keys = plain(name)
    ends = []
    for how in ("positional", "keyword") if name.startswith("lbfgs") else ("positional", "keyword", "none"):
        net, optimizer, loop = start(make, relaxation)
        for i in range(steps):
            step(net, optimizer, i, how)
        assert (loop.outer_step, loop.inner_step) == divmod(steps, relaxation.inner_steps)
        assert type(optimizer) is kind
        assert _keys(optimizer.state_dict()) == keys
        loop.detach()
        ends.append(values(net.parameters()))
        assert_equal(net.parameters(), loop.anchor)
        assert all(torch.isfinite(p).all() for p in net.parameters())
    for end in ends[1:]:
        assert_equal(ends[0], end)


@functools.cache
def plain(name: str) -> tuple[type[torch.optim.Optimizer], Any]:
    """The class of the optimizer and the names in its state, without a loop."""
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    for i in range(7):
        step(net, optimizer, i, "positional")
    return type(optimizer), _keys(optimizer.state_dict())


def _keys(state: Any) -> Any:
    """The names in a state dict, without the values."""
    return {key: _keys(value) for key, value in state.items()} if isinstance(state, dict) else None


# A spring inside the gradient, a mean of gradients and fragments have their own tests.
WRITTEN_OUT = [name for name, r in METHODS.items() if not (r.coupled or r.perturb or r.streams)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", WRITTEN_OUT)
def test_every_optimizer_takes_the_written_out_loop(name: str, method: str) -> None:
    make, r = OPTIMIZERS[name], METHODS[method]
    if not usable(name, r):
        return
    net, optimizer, loop = start(make, r)
    plain = Net()
    inner = make(plain.parameters())
    y = list(plain.parameters())
    x, z = values(y), values(y)
    momentum = [torch.zeros_like(v) for v in x]
    for i in range(7):
        step(net, optimizer, i, "positional")
        t, k = divmod(i, r.inner_steps)
        now = r.at(t)
        lr = float(inner.param_groups[0]["lr"])
        stiffness = now.stiffness or lr * now.gamma
        if r.explicit:
            closure_of(plain, inner, i)()
            for v, w in zip(y, x, strict=True):
                v.data -= stiffness * (v.data - w)
            inner.step()
        else:
            inner.step(part(at_perturbed_weights, plain, closure_of(plain, inner, i), r, now.width, i))
        noise = draws(y, i)
        for j, v in enumerate(p.data for p in y):
            if not r.explicit:
                v.copy_((v + stiffness * x[j]) / (1 + stiffness))
            v += lr**0.5 * now.noise * noise[j]
            z[j] += now.average * (v - z[j])
            if k + 1 == r.inner_steps:
                d = x[j] - z[j]
                momentum[j] = r.outer_momentum * momentum[j] + d
                x[j] -= now.outer_lr * (d + r.outer_momentum * momentum[j])
                if r.reset:
                    v.copy_(x[j])
                    z[j].copy_(x[j])
        loop.unperturb()
        torch.testing.assert_close(loop.anchor, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(values(net.parameters()), values(y), rtol=1e-12, atol=1e-12)


def at_perturbed_weights(
    net: Net, closure: Callable[[], Tensor], relaxation: le.Relaxation, width: float, number: int
) -> Tensor:
    """The loss and the gradients at y + width N(0, I) in the relaxation's scale, with y in the parameters."""
    params = list(net.parameters())
    y = values(params)
    of = {"filter": filter_norms, "relative": relative_scales, "absolute": lambda y: [torch.ones_like(v) for v in y]}
    scales = of[relaxation.scale](y)
    for p, s, n in zip(params, scales, perturbations(params, number), strict=True):
        p.data += width * s * n
    loss = closure()
    for p, v in zip(params, y, strict=True):
        p.data.copy_(v)
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_is_the_users_optimizer_bit_for_bit(name: str) -> None:
    net, optimizer, _ = start(OPTIMIZERS[name], le.Relaxation())
    plain = Net()
    reference = OPTIMIZERS[name](plain.parameters())
    for i in range(100):
        step(net, optimizer, i % 5, "positional")
        step(plain, reference, i % 5, "positional")
        assert_equal(net.parameters(), plain.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_in_no_loss_keeps_its_value(method: str) -> None:
    net, unused = Net(), torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    before = unused.detach().clone()
    optimizer = torch.optim.SGD([*net.parameters(), unused], lr=0.1)
    loop = le.relax(optimizer, METHODS[method], seed=0)
    loop.begin()
    for i in range(7):
        step(net, optimizer, i)
    loop.detach()
    assert torch.equal(unused, before)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_unfrozen_and_frozen_again(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["adamw"], METHODS[method])
    at_start = loop.anchor[1].clone()
    net.b.requires_grad_(False)
    for i in range(4):
        step(net, optimizer, i)
    assert torch.equal(loop.anchor[1], at_start)
    net.b.requires_grad_(True)
    for i in range(4, 10):
        step(net, optimizer, i)
    moved = loop.anchor[1].clone()
    assert not torch.equal(moved, at_start)
    net.b.requires_grad_(False)
    optimizer.zero_grad()
    for i in range(10, 20):  # a loop that it was part of may end with an outer step
        step(net, optimizer, i)
    settled = loop.anchor[1].clone()
    for i in range(20, 26):
        step(net, optimizer, i)
    assert torch.equal(loop.anchor[1], settled)
    loop.detach()
    assert_equal(net.parameters(), loop.anchor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_has_float32_anchors_and_averages(method: str, dtype: torch.dtype) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method], dtype=dtype)
    for i in range(7):
        step(net, optimizer, i)
        assert all(p.dtype == dtype for p in net.parameters())
    if not METHODS[method].perturb:
        assert {t.dtype for t in [*loop.anchor, *loop.average]} == {torch.float32}
    x = values(loop.anchor)
    loop.detach()
    assert_equal(net.parameters(), [v.to(dtype) for v in x])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_changes_nothing_and_a_skipped_step_is_none(method: str, fused: bool) -> None:
    """With powers of two as scales the same weights come out, and a batch of inf gradients leaves no trace."""
    relaxation, make = METHODS[method], part(torch.optim.SGD, lr=0.125, momentum=0.5, fused=fused)
    plain, reference, _ = start(make, relaxation, dtype=torch.float32)
    net, optimizer, loop = start(make, relaxation, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(9):
        # torch leaves the momentum of fused SGD uninitialised where its first update is skipped.
        if i in ((3, 5, 6) if fused else (0, 4, 5)):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, i)).backward()
            net.a.grad[0, 0] = float("inf")
            before = values([*net.parameters(), *loop.anchor, *loop.average])
            scaler.step(optimizer)
            scaler.update()
            assert_equal(before, [*net.parameters(), *loop.anchor, *loop.average])
        step(plain, reference, i)
        optimizer.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(values(net.parameters()), values(plain.parameters()), rtol=0, atol=1e-6)
    assert (loop.outer_step, loop.inner_step) == divmod(9, relaxation.inner_steps)


Training = tuple[Net, torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def in_groups(name: str, net: Net) -> Training:
    """An optimizer with a schedule and two groups, where it can have them."""
    groups = [{"params": [net.a]}, {"params": [net.b]}]
    optimizer = OPTIMIZERS[name](net.parameters() if name.startswith("lbfgs") else groups)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


def copy_of(name: str, training: Training) -> Training:
    """Through a pickle, or for torch's LBFGS, a pickle of which cannot step, through its state."""
    if not name.startswith("lbfgs"):
        return pickle.loads(pickle.dumps(training))
    new = in_groups(name, Net(5))
    for one, other in zip(new, training, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    return new


@functools.cache
def plain_rates(name: str) -> list[float]:
    net, optimizer, scheduler = in_groups(name, Net())
    for i in range(10):
        step(net, optimizer, i, "positional")
        scheduler.step()
    return rates_of(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_training_with_everything_in_it(name: str, method: str) -> None:
    """Two groups, a schedule, weights frozen at first, a step without gradients, and a pickle to go on from midway."""
    relaxation = METHODS[method]
    if not usable(name, relaxation):
        return

    def go(training: Training, loop: le.InnerOuter, steps: range) -> list[Tensor]:
        net, optimizer, scheduler = training
        for i in steps:
            if i == 3:
                assert torch.equal(loop.anchor[1], Net().b)
                net.b.requires_grad_(True)
            if i == 7 and not name.startswith("lbfgs"):
                before, counted = values(net.parameters()), (loop.outer_step, loop.inner_step)
                optimizer.zero_grad()
                optimizer.step()
                assert_equal(before, net.parameters())
                assert (loop.outer_step, loop.inner_step) == counted
            step(net, optimizer, i, "positional")
            scheduler.step()
        return values([*net.parameters(), *loop.anchor, *loop.average])

    training = in_groups(name, Net())
    training[0].b.requires_grad_(False)
    loop = le.relax(training[1], relaxation, seed=3)
    go(training, loop, range(5))
    again, state = copy_of(name, training), through_a_file(loop.state_dict())
    end = go(training, loop, range(5, 10))
    assert (loop.outer_step, loop.inner_step) == divmod(10, relaxation.inner_steps)
    assert not torch.equal(loop.anchor[1], Net().b)
    assert rates_of(training[1]) == plain_rates(name)
    resumed = le.relax(again[1], relaxation, seed=5)
    resumed.load_state_dict(state)
    assert_equal(go(again, resumed, range(5, 10)), end)
    assert rates_of(again[1]) == plain_rates(name)
