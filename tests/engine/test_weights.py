"""Which of x, y and z a parameter holds, and what becomes of what is written into it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.loop import InnerOuter
from lightning_entropy.engine.weight import running_means
from lightning_entropy.engine.weights import Holds, Weights
from tests.engine.methods_table import METHODS, OPTIMIZERS, perturbs
from tests.engine.training import Net, assert_equal, batch, start, step, through_a_file, values


def test_a_late_parameter_starts_at_its_own_value() -> None:
    """Loaded, or changed by hand, while it was frozen."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.hamilton_jacobi(4, 100.0))
    net.b.requires_grad_(False)
    step(net, optimizer, 0)
    with torch.no_grad():
        net.b.fill_(5.0)
    net.b.requires_grad_(True)
    step(net, optimizer, 1)
    assert torch.equal(loop.anchor[1], torch.full_like(net.b, 5.0))
    assert (net.b - 5).abs().max() < 1


def test_a_half_precision_anchor_keeps_what_its_parameter_rounds_away() -> None:
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([w], lr=2**-8)  # the spacing of bfloat16 below 1
    loop = le.relax(optimizer, le.Relaxation(outer_lr=2**-6))
    x = 1.0
    for _ in range(4):
        w.grad = torch.ones_like(w)
        optimizer.step()
        x += 2**-6 * (1 - 2**-8 - x)  # every loop starts at the rounded anchor, 1
        assert loop.anchor[0].item() == pytest.approx(x, abs=1e-7)
        assert w.item() == 1.0


def test_at_anchor_shows_x_and_gives_y_back() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"])
    for i in range(4):
        step(net, optimizer, i)
    y, x = values(net.parameters()), values(loop.anchor)
    assert not torch.equal(y[0], x[0])
    assert not loop.shows_anchor
    with loop.at_anchor():
        assert loop.shows_anchor
        assert_equal(net.parameters(), x)
        with loop.at_anchor():
            assert_equal(net.parameters(), x)
        assert_equal(net.parameters(), x)
        assert_equal(loop.anchor, x)
    assert_equal(net.parameters(), y)
    with pytest.raises(OSError, match="disk"), loop.at_anchor():
        raise OSError("disk full")
    assert_equal(net.parameters(), y)


@pytest.mark.parametrize("method", METHODS)
def test_looking_changes_nothing(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], METHODS[method])
    unseen, reference, _ = start(OPTIMIZERS["sgd_momentum"], METHODS[method])
    for i in range(8):
        with loop.at_anchor():
            assert_equal(net.parameters(), loop.anchor)
            loop.state_dict()
        step(net, optimizer, i)
        step(unseen, reference, i)
        assert_equal(net.parameters(), unseen.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_looking_in_inference_mode(method: str) -> None:
    """Nothing made there may be needed later: inference tensors cannot be updated."""
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], METHODS[method])
    for i in range(5):
        with torch.inference_mode(), loop.at_anchor():
            net(batch(0)[0])
        step(net, optimizer, i)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_weights_changed_while_x_is_shown_are_the_new_x(method: str, steps: int) -> None:
    """As if the loop had stood there: the next gradient is of the new weights, the spring pulls to them."""
    relaxation = METHODS[method]
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation)
    for i in range(steps):
        step(net, optimizer, i)
    other = Net(seed=9)
    with loop.at_anchor():
        net.load_state_dict(other.state_dict())
    assert_equal(loop.anchor, other.parameters())
    if perturbs(relaxation):
        moved = (net.a - other.a).abs().max()
        assert moved < 0.5
        assert moved > 0 or method == "smoothed_late"  # which perturbs from the second loop on
    else:
        assert_equal(net.parameters(), other.parameters())
        assert_equal(loop.average, other.parameters())
    for i in range(6):
        step(net, optimizer, i)
    loop.detach()
    assert (net.a - other.a).norm() < (net.a - Net().a).norm()


@pytest.mark.parametrize("method", ["entropy_sgd", "heat_averaged"])
def test_detach_while_x_is_shown(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    step(net, optimizer, 0)
    with loop.at_anchor():
        x = values(net.parameters())
        loop.detach()
    assert_equal(net.parameters(), x)
    with loop.at_anchor():
        assert_equal(net.parameters(), x)
    assert_equal(net.parameters(), x)


@pytest.mark.parametrize("method", ["entropy_sgd", "hamilton_jacobi", "heat"])
def test_weights_loaded_and_saved_while_x_is_shown_are_the_new_x(method: str) -> None:
    relaxation = METHODS[method]
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation)
    for i in range(3):
        step(net, optimizer, i)
    with loop.at_anchor():
        net.load_state_dict({name: torch.full_like(value, 0.5) for name, value in net.state_dict().items()})
        saved = through_a_file({"model": net.state_dict(), "loop": loop.state_dict(), "sgd": optimizer.state_dict()})
    new = Net(5)
    new_optimizer = OPTIMIZERS["sgd"](new.parameters())
    new_loop = le.relax(new_optimizer, relaxation, seed=8)
    new_optimizer.load_state_dict(saved["sgd"])
    new.load_state_dict(saved["model"])
    new_loop.load_state_dict(saved["loop"])
    for i in range(3, 12):
        step(net, optimizer, i)
        step(new, new_optimizer, i)
    assert_equal([*new.parameters(), *new_loop.anchor], [*net.parameters(), *loop.anchor])


# Before a loop begins the parameter is x, and in its middle it is y

# Where fragments have their turns at different times, there is no such moment.
TOGETHER = {name: r for name, r in METHODS.items() if not r.streams}
RESETTING = [name for name, relaxation in TOGETHER.items() if relaxation.reset]
WITH_Y = [name for name, r in TOGETHER.items() if r.has_anchor and (r.inner_steps > 1 or not r.reset)]


@pytest.mark.parametrize("loops", [0, 1, 2])
@pytest.mark.parametrize("method", RESETTING)
def test_what_is_written_before_a_loop_begins_is_the_new_x(method: str, loops: int) -> None:
    """A clamp after the outer step, say: as if it were done in at_anchor(), and seen by everyone at once."""
    relaxation = METHODS[method]
    net, optimizer, loop = start(OPTIMIZERS["adamw"], relaxation)
    twin, twin_optimizer, twin_loop = start(OPTIMIZERS["adamw"], relaxation)
    for i in range(20):
        if i == loops * relaxation.inner_steps:
            loop.unperturb()
            with torch.no_grad():
                net.a.clamp_(-0.1, 0.1)
            with twin_loop.at_anchor(), torch.no_grad():
                twin.a.clamp_(-0.1, 0.1)
            assert loop.shows_anchor
            for seen in (loop.anchor, loop.average, [net.a, net.b]):
                assert seen[0].abs().max() == 0.1
            saved = through_a_file(loop.state_dict())["slots"]
            assert all(torch.equal(saved["0"][key], net.a) for key in saved.get("0", {}) if key == "anchor")
            assert loops == 0 or "0" in saved
            loop.prepare()
            if relaxation.has_anchor:  # or else x moves with every update
                assert loop.anchor[0].abs().max() == 0.1
        step(net, optimizer, i)
        step(twin, twin_optimizer, i)
        assert_equal(
            [*net.parameters(), *loop.anchor, *loop.average],
            [*twin.parameters(), *twin_loop.anchor, *twin_loop.average],
        )


@pytest.mark.parametrize("method", RESETTING)
def test_a_clamp_after_every_outer_step_holds_in_x(method: str) -> None:
    relaxation = METHODS[method]
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation)
    for i in range(4 * relaxation.inner_steps):
        step(net, optimizer, i)
        if loop.inner_step == 0:
            loop.unperturb()
            with torch.no_grad():
                for p in net.parameters():
                    p.clamp_(-0.1, 0.1)
            assert max(x.abs().max().item() for x in loop.anchor) == 0.1
            loop.prepare()
    loop.detach()
    assert max(p.abs().max().item() for p in net.parameters()) == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [name for name in RESETTING if METHODS[name].has_anchor])
def test_half_precision_keeps_the_anchors_bits_where_nothing_was_written(method: str, dtype: torch.dtype) -> None:
    relaxation = METHODS[method]
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation, dtype=dtype)
    for i in range(relaxation.inner_steps):
        step(net, optimizer, i)
    loop.unperturb()
    x = values(loop.anchor)
    assert_equal(net.parameters(), [v.to(dtype) for v in x])
    with torch.no_grad():
        net.a[1, 2] = 0.25
        net.b.add_(0)  # the same numbers
    x[0][1, 2] = 0.25
    assert_equal(loop.anchor, x)
    # The last iterate, where it is the mean, is as half as its parameter.
    assert_equal(loop.average, x if relaxation.average != 1 else [v.to(dtype).float() for v in x])
    loop.prepare()
    loop.unperturb()
    assert_equal(loop.anchor, x)
    assert loop.weights[net.a].anchor.dtype == torch.float32


def test_half_precision_anchors_have_bits_of_their_own() -> None:
    """Or else the test above says nothing."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"], dtype=torch.bfloat16)
    for i in range(3):
        step(net, optimizer, i)
    assert all((x != x.to(torch.bfloat16)).any() for x in loop.anchor)


@pytest.mark.parametrize("method", WITH_Y)
def test_what_is_written_in_the_middle_of_a_loop_moves_y_alone(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    step(net, optimizer, 0)
    loop.unperturb()
    x = values(loop.anchor)
    with torch.no_grad():
        net.a.fill_(0.5)
    written = values(net.parameters())
    assert not loop.shows_anchor
    assert_equal(loop.anchor, x)
    slots = loop.state_dict()["slots"]
    assert_equal([slots["0"]["anchor"], slots["1"]["anchor"]], x)
    assert_equal([slots["0"]["inner"], slots["1"]["inner"]], written)
    with loop.at_anchor():
        assert_equal(net.parameters(), x)
    loop.unperturb()
    assert_equal(net.parameters(), written)
    loop.prepare()
    step(net, optimizer, 1)
    if METHODS[method].inner_steps > 2:
        assert_equal(loop.anchor, x)


@pytest.mark.parametrize(
    "relaxation", [le.elastic_sgd(2, 0.5), le.parle(2), le.Relaxation(inner_steps=2, rho=0.5, width=0.1)]
)
def test_with_replicas_the_mean_starts_from_the_written_value(relaxation: le.Relaxation) -> None:
    sent: list[list[Tensor]] = []

    def replica_mean(tensors: list[Tensor]) -> list[Tensor]:
        sent.append(values(tensors))
        return [t.clone() for t in tensors]

    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    # As the drivers do it: whoever drives the loop prepares it, when the next batch begins.
    loop = InnerOuter(optimizer, relaxation, replica_mean=replica_mean, seed=0, prepare_after_step=False)
    for i in range(3):
        loop.prepare()
        assert len(sent) == 1
        assert_equal(sent.pop(), loop.anchor)
        for k in range(2):
            loop.prepare()
            step(net, optimizer, 2 * i + k)
        assert not sent
        with torch.no_grad():
            net.a.fill_(float(i))
        assert (loop.anchor[0] == i).all()
    loop.prepare()
    assert (sent[0][0] == 2).all()


@pytest.mark.parametrize("method", RESETTING)
def test_detach_after_a_write_before_a_loop_agrees_with_the_anchor(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS[method])
    for i in range(METHODS[method].inner_steps):
        step(net, optimizer, i)
    loop.unperturb()
    with torch.no_grad():
        net.a.fill_(5.0)
    loop.detach()
    assert (net.a == 5).all()
    assert_equal(loop.anchor, net.parameters())


# The state of single weights


def weights_of(*tensors: Tensor, names: Any = None) -> tuple[list[torch.nn.Parameter], Weights]:
    params = [torch.nn.Parameter(t) for t in tensors]
    return params, Weights(torch.optim.SGD(params, lr=0.1), names and dict(zip(params, names, strict=True)))


@torch.no_grad()
def test_what_the_parameters_hold_from_beginning_to_end() -> None:
    """x = 1, y = 3: the parameter and its neighbours at every move."""
    (p,), weights = weights_of(torch.tensor([1.0]))
    w = weights.track(p)
    assert (weights.holds, weights.at_rest, weights.shown) == (Holds.ANCHOR, True, False)
    assert weights.anchor_of(p) is None
    weights.begin()
    p.fill_(3.0)
    assert (weights.holds, weights.at_rest) == (Holds.INNER, False)
    assert weights.anchor_of(p) is w.anchor
    assert (p.item(), w.anchor.item(), w.inner.item(), w.mean.item()) == (3, 1, 3, 3)
    weights.set_aside()
    p.fill_(9.0)
    assert weights.holds is Holds.OTHER
    assert weights.anchor_of(p) is w.anchor
    assert (w.inner.item(), w.mean.item()) == (3, 3)
    weights.take_back()
    assert (weights.holds, p.item()) == (Holds.INNER, 3)
    weights.show(Holds.OTHER, {p: torch.tensor([5.0])})
    assert (weights.holds, weights.shown, p.item()) == (Holds.OTHER, True, 5)
    assert weights.anchor_of(p) is None
    weights.show(Holds.ANCHOR, {p: torch.tensor([7.0])})  # the outermost call decides
    assert p.item() == 5
    assert weights.hide() is None
    assert (w.anchor.item(), w.inner.item()) == (1, 3)
    assert weights.hide() is Holds.OTHER
    assert (weights.holds, p.item(), w.anchor.item()) == (Holds.INNER, 3, 1)
    assert weights.hide() is None  # once too often
    assert p.item() == 3
    p.copy_(w.anchor)
    weights.rest()
    assert weights.at_rest
    weights.begin()
    p.fill_(4.0)
    weights.detach()
    assert (weights.holds, p.item()) == (Holds.DETACHED, 1)
    weights.show(Holds.ANCHOR, {p: torch.tensor([7.0])})
    assert (weights.shown, p.item()) == (False, 1)


@torch.no_grad()
def test_what_is_written_over_a_stand_in_is_the_new_x_and_what_is_not_is_not() -> None:
    (a, b), weights = weights_of(torch.tensor([1.0]), torch.tensor([2.0]))
    for p in (a, b):
        running_means([weights.track(p)])
    weights.begin()
    a.fill_(10.0)
    b.fill_(20.0)
    weights.show(weights.holds, {a: torch.tensor([5.0]), b: torch.tensor([6.0])})
    a.fill_(7.0)
    weights.settle()
    assert (weights[a].anchor.item(), weights[b].anchor.item()) == (7, 2)
    weights.hide()
    assert (a.item(), b.item()) == (7, 20)
    assert (weights[a].anchor.item(), weights[b].anchor.item()) == (7, 2)
    assert weights[a].average is None
    assert weights[a].replaced and not weights[b].replaced


def test_a_state_without_x_loaded_while_another_value_is_shown_takes_x_and_not_that_value() -> None:
    """A consensus of replicas, say; what was written over it is x."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], METHODS["entropy_sgd"])
    step(net, optimizer, 0)
    y, x = values(net.parameters()), values(loop.anchor)
    loop.show({p: torch.ones_like(p) for p in net.parameters()})
    loop.load_state_dict(through_a_file(loop.state_dict(anchor=False)))
    assert_equal(loop.anchor, x)
    assert_equal(net.parameters(), x)
    loop.hide()
    assert_equal(loop.anchor, x)
    assert_equal(net.parameters(), y)


@torch.no_grad()
def test_tied_weights_are_x_at_all_times() -> None:
    (p,), _ = weights_of(torch.tensor([1.0]))
    weights = Weights(torch.optim.SGD([p], lr=0.1), tied=True)
    w = weights.track(p)
    weights.begin()
    assert weights.at_rest
    p.fill_(3.0)
    weights.settle()
    assert w.anchor.item() == 3
    weights.set_aside()
    assert (weights.holds, w.inner.item()) == (Holds.OTHER, 3)
    p.fill_(9.0)
    weights.take_back()
    assert (weights.at_rest, p.item()) == (True, 3)


@torch.no_grad()
def test_who_steps_now_and_how_fast() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [{"params": [a, b], "lr": 0.5}, {"params": [c], "lr": torch.tensor(0.25)}]
    weights = Weights(torch.optim.SGD(groups, lr=0.1))
    b.grad, c.grad = torch.ones(1), torch.ones(1)
    stepping, rates = weights.stepping()
    assert [w.param for w in stepping] == [b, c]
    assert rates == [0.5, 0.25]
    assert a not in weights
    assert b in weights


def test_a_state_has_the_names_and_positions_of_its_parameters() -> None:
    (a, b), weights = weights_of(torch.ones(1), torch.ones(2), names=["first", "second"])
    weights.track(b)
    assert list(weights.state_dict(anchor=True)) == ["second"]
    (a, b), weights = weights_of(torch.ones(1), torch.ones(2))
    weights.track(b)
    weights.track(a)
    assert list(weights.state_dict(anchor=True)) == ["0", "1"]
    assert list(weights.state_dict(anchor=False)["1"]) == []  # all of it is in the parameter
