"""Which of x, y and z a parameter holds, and what becomes of what is written into it."""

import pytest
import torch

import lightning_entropy as le
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
        assert not torch.equal(net.a, other.a)
        assert (net.a - other.a).abs().max() < 0.1
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
