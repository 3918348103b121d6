"""The spring in its three forms, the noise and the running mean, as a chain applies them."""

import warnings

import pytest
import torch

import lightning_entropy as le
from tests.engine.methods_table import METHODS, Make, part
from tests.engine.training import Net, assert_equal, loss_of, start, step, values


def test_each_group_has_its_own_lr_in_the_spring_and_the_noise() -> None:
    w = [torch.nn.Parameter(torch.full((100_000,), 2.0, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w[0]], "lr": 0.25}, {"params": [w[1]], "lr": torch.tensor(1.0)}])
    le.relax(optimizer, le.Relaxation(inner_steps=5, gamma=2.0, noise=0.1), seed=0)
    for p, lr in zip(w, (0.25, 1.0), strict=True):
        p.grad = torch.full_like(p, 1 / lr)  # one step of size 1
    optimizer.step()
    for p, lr in zip(w, (0.25, 1.0), strict=True):
        expected = (1 + 2 * lr * 2) / (1 + 2 * lr)
        assert p.mean().item() == pytest.approx(expected, abs=2e-3)
        assert p.std().item() == pytest.approx(0.1 * lr**0.5, rel=0.01)


@pytest.mark.parametrize("make", [part(torch.optim.SGD, lr=0.1), part(torch.optim.SparseAdam, lr=0.1)])
@pytest.mark.parametrize("relaxation", [METHODS["entropy_sgd"], METHODS["hamilton_jacobi_pull"]])
def test_sparse_gradients(make: Make, relaxation: le.Relaxation) -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = make(table.parameters())
    loop = le.relax(optimizer, relaxation, seed=0)
    before = table.weight.detach().clone()
    for _ in range(7):
        optimizer.zero_grad()
        table(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
    loop.detach()
    assert (table.weight < before)[[1, 3]].all()
    assert torch.isfinite(table.weight).all()


def test_a_coupled_spring_refuses_sparse_gradients_before_any_weight_changed() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    le.relax(optimizer, METHODS["entropy_sgd_coupled"], seed=0)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match="coupled must be False where gradients are sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_unscaled_by_the_user_before_a_fused_step() -> None:
    make = part(torch.optim.SGD, lr=0.125, fused=True)
    plain, reference, _ = start(make, METHODS["entropy_sgd_coupled"], dtype=torch.float32)
    net, optimizer, _ = start(make, METHODS["entropy_sgd_coupled"], dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(5):
        step(plain, reference, i)
        optimizer.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(values(net.parameters()), values(plain.parameters()), rtol=0, atol=1e-6)


def test_schedulers_count_steps_and_the_spring_follows_the_lr() -> None:
    w = torch.nn.Parameter(torch.tensor([4.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, le.Relaxation(inner_steps=10, gamma=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch == 1 else 1.0)
    w.grad = torch.ones(1)
    path = []
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        path.append(w.item())
    # 4 -> 3, half way back to 4; lr = 0: nothing moves; 3.5 -> 2.5, half way back
    assert path == [3.5, 3.5, 3.25]
    assert scheduler.get_last_lr() == [1.0]


@pytest.mark.parametrize("form", ["coupled", "explicit"])
def test_an_unstable_spring_warns_once_with_the_numbers(form: str) -> None:
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.1)
    le.relax(optimizer, le.Relaxation(inner_steps=2, gamma=le.Scoping(10.0, 1.0), **{form: True}))
    caught: list[warnings.WarningMessage] = []
    for _ in range(6):
        w.grad = torch.zeros(1)
        with warnings.catch_warnings(record=True) as now:
            warnings.simplefilter("always")
            optimizer.step()
        caught += now
    assert len(caught) == 1
    assert "lr * gamma must be below 2" in str(caught[0].message)
    assert "got 2 with gamma = 20 at outer step 1" in str(caught[0].message)


def test_the_default_spring_is_stable_for_every_stiffness_and_never_warns() -> None:
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=1e3)
    le.relax(optimizer, le.hamilton_jacobi(5, 1e12))
    for _ in range(20):
        w.grad = torch.ones(1)
        optimizer.step()
    assert abs(w.item() - 1) < 1e-3


def test_a_rate_below_zero_has_no_spring_and_no_noise() -> None:
    """As a schedule of the user's may give by a hair at its end."""
    for lr in (-0.1, torch.tensor(-0.1)):
        net, optimizer, _ = start(part(torch.optim.SGD, lr=0.1), le.Relaxation(inner_steps=5, gamma=2.0, noise=0.1))
        plain = Net()
        reference = torch.optim.SGD(plain.parameters(), lr=0.1)
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = lr
        step(net, optimizer, 0)
        step(plain, reference, 0)
        assert_equal(net.parameters(), plain.parameters())
