"""Gradients at perturbed weights: alone and inside a chain."""

import math
import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.loop import InnerOuter
from tests.engine.methods_table import OPTIMIZERS, part
from tests.engine.training import (
    Net,
    assert_equal,
    closure_of,
    loss_of,
    perturbations,
    start,
    step,
    through_a_file,
    values,
)
from tests.reference import filter_norms

NAN, INF = float("nan"), float("inf")


# Alone, and inside a chain: in the middle of a loop, where y is not x.
METHODS_THAT_PERTURB = {
    "heat": le.heat(1, 100.0),
    "heat_averaged": le.heat(3, 100.0),
    "chain": le.Relaxation(inner_steps=3, gamma=0.5, noise=1e-2, average=0.5, width=0.1),
    "filter": le.Relaxation(inner_steps=3, gamma=0.5, width=0.1, scale="filter"),
    "relative": le.Relaxation(inner_steps=3, gamma=0.5, width=0.1, scale="relative"),
    "two_timescale": le.Relaxation(gamma=0.5, reset=False, outer_lr=0.1, width=0.1),
}
each = pytest.mark.parametrize("relaxation", METHODS_THAT_PERTURB.values(), ids=METHODS_THAT_PERTURB)
Started = tuple[Net, torch.optim.Optimizer, le.InnerOuter]


def started(relaxation: le.Relaxation, steps: int = 1, **options: Any) -> tuple[Started, list[Tensor]]:
    """A loop some steps on, its weights perturbed, and y."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation, **options)
    for i in range(steps):
        step(net, optimizer, i)
    loop.unperturb()
    y = values(net.parameters())
    loop.prepare()
    assert all(not torch.equal(p, v) for p, v in zip(net.parameters(), y, strict=True))
    return (net, optimizer, loop), y


@each
@pytest.mark.parametrize("how", ["none", "positional"])
def test_a_write_into_perturbed_weights_is_an_error_that_leaves_y(relaxation: le.Relaxation, how: str) -> None:
    (net, optimizer, loop), y = started(relaxation)
    x = values(loop.anchor)
    with torch.no_grad():
        net.b.clamp_(-1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"):
        step(net, optimizer, 1, how)
    assert_equal(net.parameters(), y)
    assert_equal(loop.anchor, x)
    loop.prepare()
    step(net, optimizer, 1)
    with loop.at_anchor(), torch.no_grad():
        net.b.zero_()
    assert loop.anchor[1].abs().max() == 0


@each
def test_looking_at_perturbed_weights_that_were_written_is_the_error_too(relaxation: le.Relaxation) -> None:
    (net, optimizer, loop), y = started(relaxation)
    with torch.no_grad():
        net.b.zero_()
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"), loop.at_anchor():
        pass
    assert_equal(net.parameters(), y)
    assert not loop.weights.shown
    step(net, optimizer, 1)


@each
def test_a_write_of_the_same_numbers_is_none(relaxation: le.Relaxation) -> None:
    (net, _, loop), y = started(relaxation)
    with torch.no_grad():
        net.b.add_(0)
        net.a.copy_(net.a.clone())
    loop.unperturb()
    assert_equal(net.parameters(), y)


@each
def test_a_write_into_weights_that_their_forward_pass_writes_is_not_looked_for(relaxation: le.Relaxation) -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    loop = InnerOuter(optimizer, relaxation, seed=3, self_writing={net.b})
    loop.prepare()
    with torch.no_grad():
        net.b.zero_()
    step(net, optimizer, 0)
    with torch.no_grad():
        net.a.zero_()
    with pytest.raises(RuntimeError, match="weights were modified"):
        step(net, optimizer, 1)


@each
def test_a_parameter_frozen_while_it_is_perturbed_is_no_write(relaxation: le.Relaxation) -> None:
    (net, optimizer, loop), y = started(relaxation)
    with torch.no_grad():
        net.b.add_(0)
    net.b.requires_grad_(False)
    optimizer.zero_grad()
    loss_of(net, 1).backward()
    optimizer.step()
    loop.unperturb()
    assert torch.equal(net.b, y[1])
    with loop.at_anchor():
        assert torch.equal(net.b, loop.anchor[1])


@each
def test_looking_at_perturbed_weights_shows_x_and_then_the_same_perturbation(relaxation: le.Relaxation) -> None:
    (net, _, loop), _ = started(relaxation)
    perturbed, x, z = values(net.parameters()), values(loop.anchor), values(loop.average)
    assert not loop.shows_anchor
    with loop.at_anchor():
        assert loop.shows_anchor
        assert_equal(net.parameters(), x)
        with loop.at_anchor():
            assert_equal(net.parameters(), x)
        assert_equal(loop.anchor, x)
        assert_equal(loop.average, z)
    assert_equal(net.parameters(), perturbed)
    assert_equal(loop.anchor, x)
    assert_equal(loop.average, z)


@each
def test_weights_are_perturbed_once_however_often_one_prepares(relaxation: le.Relaxation) -> None:
    (net, _, loop), y = started(relaxation)
    perturbed = values(net.parameters())
    for _ in range(3):
        loop.prepare()
        assert_equal(net.parameters(), perturbed)
    for _ in range(2):
        loop.unperturb()
        assert_equal(net.parameters(), y)


@each
def test_detach_from_perturbed_weights_leaves_x(relaxation: le.Relaxation) -> None:
    for written in (False, True):
        (net, _, loop), _ = started(relaxation)
        x = values(loop.anchor)
        if written:
            with torch.no_grad():
                net.b.zero_()
        loop.detach()
        assert_equal(net.parameters(), x)


@each
def test_a_restart_of_perturbed_weights_is_no_write(relaxation: le.Relaxation) -> None:
    """As of a replica that has diverged."""
    (net, optimizer, loop), _ = started(relaxation)
    loop.restart([torch.full_like(x, 0.5) for x in loop.anchor])
    assert all((x == 0.5).all() for x in [*loop.anchor, *loop.average])
    assert 0 < (net.a - 0.5).abs().max() < 1  # perturbed about the new x
    loop.unperturb()
    assert (net.a == 0.5).all()
    loop.prepare()
    step(net, optimizer, 1)


@each
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_state_is_the_same_saved_perturbed_or_not_or_while_x_is_shown(relaxation: le.Relaxation, steps: int) -> None:
    """And from each the training goes on exactly, into weights that are perturbed, or not, or shown."""
    (net, optimizer, loop), _ = started(relaxation, steps)
    saved = [through_a_file([loop.state_dict(), optimizer.state_dict()])]
    loop.unperturb()
    saved.append(through_a_file([loop.state_dict(), optimizer.state_dict()]))
    loop.prepare()
    with loop.at_anchor():
        saved.append(through_a_file([loop.state_dict(), optimizer.state_dict()]))
    assert_equal(tensors_of(saved[0]), tensors_of(saved[1]))
    assert_equal(tensors_of(saved[0]), tensors_of(saved[2]))
    for i in range(4, 9):
        step(net, optimizer, i)
    end = values([*net.parameters(), *loop.anchor, *loop.average])
    for into in ("perturbed", "not", "shown"):
        new, new_optimizer, new_loop = start(OPTIMIZERS["sgd"], relaxation, seed=5)
        step(new, new_optimizer, 99)
        new_optimizer.load_state_dict(saved[0][1])
        if into == "not":
            new_loop.unperturb()
        with new_loop.at_anchor() if into == "shown" else nullcontext():
            new_loop.load_state_dict(saved[0][0])
        for i in range(4, 9):
            step(new, new_optimizer, i)
        assert_equal([*new.parameters(), *new_loop.anchor, *new_loop.average], end)


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("scale", ["absolute", "filter"])
@pytest.mark.parametrize("frozen_from", [0, 2])
def test_a_frozen_parameter_is_not_perturbed_and_the_others_draw_what_they_did(scale: Any, frozen_from: int) -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    loop = le.relax(optimizer, le.Relaxation(inner_steps=3, gamma=0.5, width=0.1, scale=scale), seed=3)
    for i in range(7):
        loop.unperturb()
        if i == frozen_from:
            net.a.requires_grad_(False)
            optimizer.zero_grad()
        y = values(net.parameters())
        loop.prepare()
        norms = filter_norms(y) if scale == "filter" else [1.0, 1.0]
        for j, n in enumerate(perturbations(net.parameters(), i)):
            expected = y[j] + 0.1 * norms[j] * n if j or i < frozen_from else y[j]
            torch.testing.assert_close(list(net.parameters())[j].detach(), expected)
        step(net, optimizer, i)
        loop.unperturb()
        if i >= frozen_from and loop.inner_step:
            assert torch.equal(net.a, y[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["absolute", "filter"])
def test_half_precision_chain_written_out(dtype: torch.dtype, scale: Any) -> None:
    """y is half; the perturbation, the spring and the mean are taken in float32 and y is rounded after each."""
    lr, gamma, width, average, inner_steps = 0.125, 0.5, 0.1, 0.5, 3
    relaxation = le.Relaxation(inner_steps=inner_steps, gamma=gamma, width=width, average=average, scale=scale)
    net, optimizer, loop = start(part(torch.optim.SGD, lr=lr, foreach=False), relaxation, dtype=dtype)
    plain = Net(dtype=dtype)
    inner = torch.optim.SGD(plain.parameters(), lr=lr, foreach=False)
    params = list(plain.parameters())
    x = [p.detach().float() for p in params]
    z = values(x)
    for i in range(9):
        step(net, optimizer, i)
        y = values(params)
        norms = [1.0, 1.0] if scale == "absolute" else filter_norms([v.float() for v in y])
        for p, s, n in zip(params, norms, perturbations(params, i), strict=True):
            p.data.copy_(p.data.float() + n * (width * s))
        closure_of(plain, inner, i)()
        for p, v in zip(params, y, strict=True):
            p.data.copy_(v)
        inner.step()
        for j, p in enumerate(params):
            k = lr * gamma
            p.data.copy_(torch.lerp(p.data.float(), x[j], k / (1 + k)))
            z[j].lerp_(p.data.float(), average)
            if (i + 1) % inner_steps == 0:
                x[j] = z[j].clone()
                p.data.copy_(x[j])
        loop.unperturb()
        assert_equal(net.parameters(), params)
        assert_equal(loop.anchor, x)
        loop.prepare()


@pytest.mark.parametrize("scale", ["absolute", "filter"])
def test_compiled_or_not_a_chain_of_float64_is_the_same(scale: Any) -> None:
    """The kernel is for float32 alone: the others' noise is what it is without it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("compile=True needs a C++ compiler")
    relaxation = le.Relaxation(inner_steps=3, gamma=0.5, noise=1e-2, average=0.5, width=0.1, scale=scale)
    ends = []
    for compile in (False, True):
        net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], relaxation, compile=compile)
        for i in range(10):
            step(net, optimizer, i)
        ends.append(values([*net.parameters(), *loop.anchor]))
    assert_equal(*ends)


def test_a_skipped_step_sees_the_same_perturbation_again() -> None:
    (net, optimizer, loop), _ = started(METHODS_THAT_PERTURB["chain"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    perturbed, counted = values(net.parameters()), (loop.outer_step, loop.inner_step)
    scaler.scale(loss_of(net, 1)).backward()
    assert net.a.grad is not None
    net.a.grad[0, 0] = INF
    scaler.step(optimizer)
    scaler.update()
    assert_equal(net.parameters(), perturbed)
    assert (loop.outer_step, loop.inner_step) == counted


def test_the_perturbation_and_the_langevin_noise_are_different_draws() -> None:
    w = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=9, width=1.0, noise=1.0), seed=0)
    loop.prepare()
    perturbation = w.detach().clone()
    w.grad = torch.zeros_like(w)
    optimizer.step()
    loop.unperturb()
    assert torch.corrcoef(torch.stack([perturbation, w.detach()]))[0, 1].abs() < 5 / 100_000**0.5
    assert w.detach().std().item() == pytest.approx(1, rel=0.02)


def test_a_chain_on_a_smoothed_loss_finds_the_smoothed_proximal_point() -> None:
    """f = 1 - cos y, smoothed exp(-v/2) of it: y* = x - t exp(-v/2) sin y*, where E z settles under small steps."""
    x, variance, gamma, n = 1.0, 0.25, 1.0, 40_000
    w = torch.nn.Parameter(torch.full((n,), x, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.05)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=10**6, gamma=gamma, width=variance**0.5), seed=0)
    loop.prepare()
    for _ in range(120):
        w.grad = w.detach().sin()
        optimizer.step()
    loop.unperturb()
    y = x
    for _ in range(200):
        y = x - math.exp(-variance / 2) / gamma * math.sin(y)
    # y fluctuates by its noise's lr, and the curvature there shifts its mean by less than a tenth of that.
    assert w.mean().item() == pytest.approx(y, abs=3e-3)
    assert abs(y - (x - math.sin(y) / gamma)) > 0.03  # the point without smoothing is another


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
def test_a_width_that_turns_bad_leaves_x(bad: float) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=2, width=lambda t: 0.5 if t < 1 else bad))
    loop.prepare()
    w.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=rf"^width\(t=1\) must be a finite number >= 0, got {bad}$"):
        optimizer.step()
    assert torch.equal(w, torch.tensor([0.0, 1.0]))


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


@pytest.mark.parametrize("last", ["a", "b", "both"])
def test_a_parameter_without_a_gradient_in_the_last_step_moves_by_the_mean_of_those_it_had(last: str) -> None:
    """By eye: a linear loss has the same gradient at all weights, so that the noise does not matter."""
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    loop = le.relax(optimizer, le.heat(2, 100.0), seed=0)
    for loss in (lambda: 4 * a + 6 * b, lambda: 2 * a if last == "a" else 2 * b if last == "b" else 2 * a + 2 * b):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert [x.item() for x in loop.anchor] == {"a": [-3, -3], "b": [-2, -4], "both": [-3, -4]}[last]


@pytest.mark.parametrize("width", [0.1, 0.4])
@pytest.mark.parametrize("perturb", [True, False])
def test_a_relative_width_is_the_norm_of_the_noise_over_the_norm_of_the_filter(width: float, perturb: bool) -> None:
    """Of filters of any size and fan-in; vectors are left alone, and a filter of zeros."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-3, 1.0, 50.0, 0.0])
    small = torch.nn.Parameter(torch.randn(4, 2000, generator=g) * sizes.view(4, 1))
    large = torch.nn.Parameter(torch.randn(4, 100, 10, 10, generator=g) * sizes.view(4, 1, 1, 1))
    vector, scalar = torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.tensor(2.0))
    params = [vector, small, scalar, large]
    before = values(params)
    relaxation = le.Relaxation(width=width, scale="relative", perturb=perturb)
    loop = le.relax(torch.optim.SGD(params, lr=0.1), relaxation, seed=0)
    loop.prepare()
    assert_equal([vector, scalar], [before[0], before[2]])
    for p, x in ((small, before[1]), (large, before[3])):
        noise = (p.detach() - x).flatten(1).norm(dim=1)
        assert noise[:3].tolist() == pytest.approx((width * x.flatten(1).norm(dim=1)[:3]).tolist(), rel=0.05)
        assert noise[3] == 0
    loop.unperturb()
    assert_equal(params, before)


def test_the_noise_of_a_filter_does_not_depend_on_whether_vectors_get_any() -> None:
    ends = []
    for scale in ("filter", "relative"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).double()
        before = values(net.parameters())
        width = 0.1 if scale == "relative" else 0.1 / 2  # of four weights
        le.relax(torch.optim.SGD(net.parameters(), lr=0.1), le.heat(width=width, scale=scale), seed=0).prepare()
        ends.append([p.detach() - x for p, x in zip(net.parameters(), before, strict=True)])
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert ends[0][1].abs().min() > 0
    assert ends[1][1].abs().max() == 0


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_late_width_is_the_plain_method_and_then_that_with_noise(inner_steps: int) -> None:
    """Two outer steps without noise, whose gradients are at x; then those of a loop that has always had it."""
    late = le.heat(inner_steps, width=le.Starting(0.1, at=2))
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], late)
    for i in range(2 * inner_steps):
        x = values(net.parameters())
        assert_equal(loop.anchor, x)
        step(net, optimizer, i)
    assert loop.outer_step == 2
    assert all(not torch.equal(p, x) for p, x in zip(net.parameters(), loop.anchor, strict=True))
    other, other_optimizer, other_loop = start(OPTIMIZERS["sgd_momentum"], le.heat(inner_steps, width=0.1))
    state = through_a_file({"loop": loop.state_dict(), "optimizer": optimizer.state_dict()})
    other_optimizer.load_state_dict(state["optimizer"])
    other_loop.load_state_dict(state["loop"])
    for i in range(3):
        step(net, optimizer, i)
        step(other, other_optimizer, i)
    assert_equal(net.parameters(), other.parameters())
