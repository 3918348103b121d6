"""What the engine promises to every optimizer, and to whoever does something unusual around it."""

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_entropy as le

Make = Callable[..., torch.optim.Optimizer]
part = functools.partial

OPTIMIZERS: dict[str, Make] = {
    "sgd": part(torch.optim.SGD, lr=0.1),
    "sgd_momentum": part(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "sgd_nesterov_foreach": part(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": part(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": part(torch.optim.Adam, lr=1e-2),
    "adam_amsgrad_foreach": part(torch.optim.Adam, lr=1e-2, amsgrad=True, foreach=True),
    "adam_fused": part(torch.optim.Adam, lr=1e-2, fused=True),
    "adam_tensor_lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-2)),
    "adamw": part(torch.optim.AdamW, lr=1e-2),
    "adamw_fused": part(torch.optim.AdamW, lr=1e-2, fused=True),
    "nadam": part(torch.optim.NAdam, lr=1e-2),
    "radam": part(torch.optim.RAdam, lr=1e-2),
    "adamax": part(torch.optim.Adamax, lr=1e-2),
    "adadelta": part(torch.optim.Adadelta, lr=1.0),
    "adagrad": part(torch.optim.Adagrad, lr=1e-2),
    "adagrad_fused": part(torch.optim.Adagrad, lr=1e-2, fused=True),
    "asgd": part(torch.optim.ASGD, lr=1e-2),
    "rmsprop": part(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
    "rprop": part(torch.optim.Rprop, lr=1e-3),
    "muon": part(torch.optim.Muon, lr=1e-2),
    "adafactor": part(torch.optim.Adafactor, lr=1e-2),
    "lbfgs": part(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs_wolfe": part(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
}

RELAXATIONS: dict[str, le.Relaxation] = {
    "default": le.Relaxation(),
    "lookahead": le.lookahead(3),
    "entropy_sgd": le.entropy_sgd(3, 0.5, 1e-2),
    "entropy_sgd_coupled": le.entropy_sgd(3, 0.5, 1e-2, coupled=True, reset_momentum=True),
    "entropy_sgd_quiet": le.entropy_sgd(3, le.Scoping(0.5, 0.1), 0.0, outer_lr=0.7),
    "explicit": le.Relaxation(inner_steps=3, gamma=0.5, explicit=True),
    "hamilton_jacobi": le.hamilton_jacobi(3, 0.5),
    "hamilton_jacobi_auto": le.hamilton_jacobi(3, "auto"),
    "heat": le.heat(1, 1e4),
    "heat_averaged": le.heat(3, 1e4),
    "heat_filter": le.heat(3, 1e4, scale="filter"),
    "two_timescale": le.two_timescale(0.5),
    "elastic_sgd": le.elastic_sgd(3, 0.5),
    "local_sgd": le.local_sgd(3),
    "diloco": le.diloco(3),
    "parle": le.parle(3),
}


class Net(torch.nn.Module):
    """Matrices alone, so that every optimizer takes it."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(4, 3, generator=g, dtype=dtype) / 2)
        self.b = torch.nn.Parameter(torch.randn(2, 4, generator=g, dtype=dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T) @ self.b.T


def batch(i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + i)
    x = torch.randn(6, 3, generator=g, dtype=dtype)
    return x, x[:, :2].sin()


def loss_of(net: torch.nn.Module, i: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    x, y = batch(i, dtype)
    return (net(x) - y).square().sum()


def closure_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        return loss

    return closure


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int, how: str = "none") -> None:
    closure = closure_of(net, optimizer, i)
    if how == "positional":
        optimizer.step(closure)
    elif how == "keyword":
        optimizer.step(closure=closure)
    else:
        closure()
        optimizer.step()


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(list(left), list(right), rtol=0, atol=0, equal_nan=True)


def start(
    make: Make, relaxation: le.Relaxation, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Net, torch.optim.Optimizer, le.InnerOuter]:
    net = Net(seed, dtype)
    optimizer = make(net.parameters())
    loop = le.relax(optimizer, relaxation, **{"seed": 3, **options})
    loop.begin()
    return net, optimizer, loop


def usable(name: str, relaxation: le.Relaxation) -> bool:
    return not (
        name.startswith("lbfgs")
        and (relaxation.coupled or relaxation.explicit or (relaxation.perturb and relaxation.inner_steps > 1))
    )


# Every method with every optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", RELAXATIONS)
def test_every_method_with_every_optimizer(name: str, method: str) -> None:
    make, relaxation, steps = OPTIMIZERS[name], RELAXATIONS[method], 7
    if not usable(name, relaxation):
        return
    plain = Net()
    reference = make(plain.parameters())
    for i in range(steps):
        step(plain, reference, i, "positional")
    ends = []
    for how in ("positional", "keyword") if name.startswith("lbfgs") else ("positional", "keyword", "none"):
        net, optimizer, loop = start(make, relaxation)
        for i in range(steps):
            step(net, optimizer, i, how)
        assert (loop.outer_step, loop.inner_step) == divmod(steps, relaxation.inner_steps)
        assert type(optimizer) is type(reference)
        assert _keys(optimizer.state_dict()) == _keys(reference.state_dict())
        loop.detach()
        ends.append(values(net.parameters()))
        assert_equal(net.parameters(), loop.anchor)
        assert all(torch.isfinite(p).all() for p in net.parameters())
    for end in ends[1:]:
        assert_equal(ends[0], end)


def _keys(state: Any) -> Any:
    """The names in a state dict, without the values."""
    return {key: _keys(value) for key, value in state.items()} if isinstance(state, dict) else None


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "method",
    ["lookahead", "entropy_sgd_quiet", "hamilton_jacobi", "explicit", "two_timescale", "diloco"],
)
def test_every_optimizer_takes_the_written_out_loop(name: str, method: str) -> None:
    make, r = OPTIMIZERS[name], RELAXATIONS[method]
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
        stiffness = float(inner.param_groups[0]["lr"]) * now.gamma
        if r.explicit:
            closure_of(plain, inner, i)()
            for v, w in zip(y, x, strict=True):
                v.data -= stiffness * (v.data - w)
            inner.step()
        else:
            step(plain, inner, i, "positional")
        for j, v in enumerate(p.data for p in y):
            if not r.explicit:
                v.copy_((v + stiffness * x[j]) / (1 + stiffness))
            z[j] += now.average * (v - z[j])
            if k + 1 == r.inner_steps:
                d = x[j] - z[j]
                momentum[j] = r.outer_momentum * momentum[j] + d
                x[j] -= now.outer_lr * (d + r.outer_momentum * momentum[j])
                if r.reset:
                    v.copy_(x[j])
                    z[j].copy_(x[j])
        torch.testing.assert_close(loop.anchor, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(values(net.parameters()), values(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_is_the_users_optimizer_bit_for_bit(name: str) -> None:
    net, optimizer, _ = start(OPTIMIZERS[name], le.Relaxation())
    plain = Net()
    reference = OPTIMIZERS[name](plain.parameters())
    for i in range(100):
        step(net, optimizer, i % 5, "positional")
        step(plain, reference, i % 5, "positional")
        assert_equal(net.parameters(), plain.parameters())


# Gradients and parameters


def test_a_step_without_any_gradient_is_none() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["entropy_sgd"])
    before = values(net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert (loop.outer_step, loop.inner_step) == (0, 0)
    assert_equal(net.parameters(), before)


@pytest.mark.parametrize("method", RELAXATIONS)
def test_a_parameter_in_no_loss_keeps_its_value(method: str) -> None:
    net, unused = Net(), torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    before = unused.detach().clone()
    optimizer = torch.optim.SGD([*net.parameters(), unused], lr=0.1)
    loop = le.relax(optimizer, RELAXATIONS[method], seed=0)
    loop.begin()
    for i in range(7):
        step(net, optimizer, i)
    loop.detach()
    assert torch.equal(unused, before)


@pytest.mark.parametrize("method", RELAXATIONS)
def test_frozen_unfrozen_and_frozen_again(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["adamw"], RELAXATIONS[method])
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


def test_a_group_added_later_joins() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["entropy_sgd"])
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


def step_without_zero(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    for p in net.parameters():
        p.grad = None
    loss_of(net, i).backward()
    optimizer.step()


@pytest.mark.parametrize("make", [part(torch.optim.SGD, lr=0.1), part(torch.optim.SparseAdam, lr=0.1)])
@pytest.mark.parametrize("relaxation", [RELAXATIONS["entropy_sgd"], RELAXATIONS["hamilton_jacobi_auto"]])
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
    le.relax(optimizer, RELAXATIONS["entropy_sgd_coupled"], seed=0)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match="coupled must be False where gradients are sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", RELAXATIONS)
def test_half_precision_has_float32_anchors_and_averages(method: str, dtype: torch.dtype) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS[method], dtype=dtype)
    for i in range(7):
        step(net, optimizer, i)
        assert all(p.dtype == dtype for p in net.parameters())
    if not RELAXATIONS[method].perturb:
        assert {t.dtype for t in [*loop.anchor, *loop.average]} == {torch.float32}
    x = values(loop.anchor)
    loop.detach()
    assert_equal(net.parameters(), [v.to(dtype) for v in x])


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


# Gradient scalers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", RELAXATIONS)
def test_a_scaler_changes_nothing_and_a_skipped_step_is_none(method: str, fused: bool) -> None:
    """With powers of two as scales the same weights come out, and a batch of inf gradients leaves no trace."""
    relaxation, make = RELAXATIONS[method], part(torch.optim.SGD, lr=0.125, momentum=0.5, fused=fused)
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


def test_unscaled_by_the_user_before_a_fused_step() -> None:
    make = part(torch.optim.SGD, lr=0.125, fused=True)
    plain, reference, _ = start(make, RELAXATIONS["entropy_sgd_coupled"], dtype=torch.float32)
    net, optimizer, _ = start(make, RELAXATIONS["entropy_sgd_coupled"], dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(5):
        step(plain, reference, i)
        optimizer.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(values(net.parameters()), values(plain.parameters()), rtol=0, atol=1e-6)


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
    net, optimizer, loop = start(OPTIMIZERS["adamw"], RELAXATIONS[method])
    for i in range(7):
        optimizer.zero_grad()
        (loss_of(net, i) * (float("nan") if i in (0, 3) else 1.0)).backward()
        if not all(torch.isfinite(p.grad).all() for p in net.parameters()):
            optimizer.zero_grad()
        optimizer.step()
    assert all(torch.isfinite(t).all() for t in [*loop.anchor, *loop.average, *net.parameters()])
    assert loop.outer_step * 3 + loop.inner_step == 5


# Closures, subclasses, copies, schedulers


@pytest.mark.parametrize("method", RELAXATIONS)
def test_training_goes_on_after_an_exception_in_the_closure(method: str) -> None:
    net, optimizer, _ = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
    clean, reference, _ = start(OPTIMIZERS["sgd"], RELAXATIONS[method])

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
@pytest.mark.parametrize("method", RELAXATIONS)
def test_a_subclass_that_calls_its_parents_step_is_one_step(method: str, kind: Any, how: str) -> None:
    plain, reference, _ = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
    net, optimizer, loop = start(part(kind, lr=0.1), RELAXATIONS[method])

    def broken() -> Tensor:
        raise OSError("no data")

    for i in range(7):
        step(plain, reference, i, how)
        step(net, optimizer, i, how)
        if i == 3:  # leaves both levels open
            with pytest.raises(OSError, match="no data"):
                optimizer.step(broken)
    assert_equal(net.parameters(), plain.parameters())
    assert (loop.outer_step, loop.inner_step) == divmod(7, RELAXATIONS[method].inner_steps)


def test_a_copied_or_pickled_optimizer_is_a_plain_one() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS["entropy_sgd"])
    step(net, optimizer, 0)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is torch.optim.SGD
        le.relax(copied, RELAXATIONS["entropy_sgd"])  # has no loop, so it can get one
        assert copied.state_dict().keys() == optimizer.state_dict().keys()
    assert (loop.outer_step, loop.inner_step) == (0, 1)
    both = copy.deepcopy((net, optimizer))
    step(both[0], both[1], 1)
    assert loop.inner_step == 1


def test_a_loaded_optimizer_keeps_its_loop() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS["lookahead"])
    step(net, optimizer, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 1)
    assert loop.inner_step == 2


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


def test_swa_utils_and_a_one_cycle_schedule_work_with_a_loop() -> None:
    net, optimizer, _ = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS["entropy_sgd"])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(7):
            step(net, optimizer, i)
            scheduler.step()
    assert not caught


# Looking at x


def test_at_anchor_shows_x_and_gives_y_back() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["entropy_sgd"])
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


@pytest.mark.parametrize("method", RELAXATIONS)
def test_looking_changes_nothing(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS[method])
    unseen, reference, _ = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS[method])
    for i in range(8):
        with loop.at_anchor():
            assert_equal(net.parameters(), loop.anchor)
            loop.state_dict()
        step(net, optimizer, i)
        step(unseen, reference, i)
        assert_equal(net.parameters(), unseen.parameters())


@pytest.mark.parametrize("method", RELAXATIONS)
def test_looking_in_inference_mode(method: str) -> None:
    """Nothing made there may be needed later: inference tensors cannot be updated."""
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], RELAXATIONS[method])
    for i in range(5):
        with torch.inference_mode(), loop.at_anchor():
            net(batch(0)[0])
        step(net, optimizer, i)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("method", RELAXATIONS)
def test_weights_changed_while_x_is_shown_are_the_new_x(method: str, steps: int) -> None:
    """As if the loop had stood there: the next gradient is of the new weights, the spring pulls to them."""
    relaxation = RELAXATIONS[method]
    net, optimizer, loop = start(OPTIMIZERS["sgd"], relaxation)
    for i in range(steps):
        step(net, optimizer, i)
    other = Net(seed=9)
    with loop.at_anchor():
        net.load_state_dict(other.state_dict())
    assert_equal(loop.anchor, other.parameters())
    if relaxation.perturb:
        assert not torch.equal(net.a, other.a)
        assert (net.a - other.a).abs().max() < 0.1
    else:
        assert_equal(net.parameters(), other.parameters())
        assert_equal(loop.average, other.parameters())
    for i in range(6):
        step(net, optimizer, i)
    loop.detach()
    assert (net.a - other.a).norm() < (net.a - Net().a).norm()


@pytest.mark.parametrize("method", RELAXATIONS)
def test_a_step_while_x_is_shown_is_an_error_that_harms_nothing(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
    unseen, reference, _ = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
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


# Attaching and detaching


@pytest.mark.parametrize("steps", [0, 2, 3])
@pytest.mark.parametrize("method", RELAXATIONS)
def test_detach_leaves_x_and_no_hook(method: str, steps: int) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
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


@pytest.mark.parametrize("method", ["entropy_sgd", "heat_averaged"])
def test_detach_while_x_is_shown(method: str) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS[method])
    step(net, optimizer, 0)
    with loop.at_anchor():
        x = values(net.parameters())
        loop.detach()
    assert_equal(net.parameters(), x)
    with loop.at_anchor():
        assert_equal(net.parameters(), x)
    assert_equal(net.parameters(), x)


def test_attaching_twice_is_refused_and_again_after_detach_is_not() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["lookahead"])
    with pytest.raises(ValueError, match="optimizer must have no loop yet"):
        le.relax(optimizer, RELAXATIONS["heat"])
    loop.detach()
    again = le.relax(optimizer, RELAXATIONS["lookahead"])
    step(net, optimizer, 0)
    assert again.inner_step == 1
    assert loop.inner_step == 0


def test_a_foreign_hook_stays() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["lookahead"])
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(loop.inner_step))
    step(net, optimizer, 0)
    loop.detach()
    step(net, optimizer, 1)
    assert seen == [1, 1]


# State

Variant = tuple[le.Relaxation, str, dict[str, Any]]


def two_replicas(tensors: list[Tensor]) -> Any:
    """A second replica that always stands at zero; waited for."""
    return lambda: [t / 2 for t in tensors]


STATES: dict[str, Variant] = {
    "entropy_sgd": (le.entropy_sgd(3, le.Scoping(0.5, 0.1), 1e-2), "sgd_momentum", {}),
    "entropy_sgd_adamw": (le.entropy_sgd(3, 0.5, 1e-2, reset_momentum=True), "adamw_fused", {}),
    "coupled": (le.entropy_sgd(3, 0.5, 1e-2, coupled=True), "sgd_nesterov_foreach", {}),
    "outer_momentum": (le.entropy_sgd(3, 0.5, 1e-2, outer_lr=0.5, outer_momentum=0.9), "sgd_momentum", {}),
    "outer_adam": (le.entropy_sgd(3, 0.5, 1e-2), "sgd", {"outer": part(torch.optim.Adam, lr=0.05)}),
    "auto": (le.hamilton_jacobi(4, "auto"), "sgd_momentum", {}),
    "two_timescale": (le.two_timescale(0.5, 1e-2), "sgd_momentum", {}),
    "average_without_reset": (le.Relaxation(inner_steps=3, gamma=0.5, average=0.5, reset=False), "sgd", {}),
    "heat": (le.heat(3, 1e2), "sgd_momentum", {}),
    "heat_filter": (le.heat(2, le.Widening(1e2, 2.0, 5), scale="filter"), "adamw", {}),
    "parle": (le.parle(3, 0.5, 0.25), "sgd_momentum", {"replica_mean": two_replicas}),
    "parle_code": (le.parle(3, 0.5, 0.25, elastic_target="average"), "sgd", {"replica_mean": two_replicas}),
    "diloco": (le.diloco(3), "adamw", {"replica_mean": two_replicas}),
    "rprop": (le.lookahead(3), "rprop", {}),
}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
    for variant in ("entropy_sgd", "heat"):
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
    net, optimizer, loop = start(OPTIMIZERS["sgd"], RELAXATIONS["entropy_sgd"])
    step(net, optimizer, 0)
    w = torch.nn.Parameter(torch.ones(1, 1))
    small = le.relax(torch.optim.SGD([w], lr=0.1), RELAXATIONS["entropy_sgd"])
    state = loop.state_dict()
    state["slots"] = {"1": state["slots"]["1"]}
    with pytest.raises(ValueError, match="got '1', which is not one"):
        small.load_state_dict(state)
    state = loop.state_dict()
    del state["slots"]["1"]
    with pytest.raises(ValueError, match=r"parameter's shape, got \(4, 3\) for '0' of shape \(1, 1\)"):
        small.load_state_dict(state)
    assert torch.equal(w, torch.ones(1, 1))


# gamma="auto", warnings, identities


def test_auto_gamma_is_what_one_computes_by_hand() -> None:
    """Gradients (1, 0), (0, 2), (3, 0) on one weight pair: mean (4/3, 2/3); lr = 0.5, so x - z = (2, 1)."""
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.5)
    loop = le.relax(optimizer, le.hamilton_jacobi(3, le.Scoping("auto", 0.5)))
    for i, g in enumerate(([1.0, 0.0], [0.0, 2.0], [3.0, 0.0])):
        assert loop.settings.gamma == 0
        assert loop.gamma_start is None, i
        w.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert loop.gamma_start == pytest.approx((16 / 9 + 4 / 9) ** 0.5 / 5**0.5, rel=1e-12)
    assert loop.gamma_start == pytest.approx(2 / 3, rel=1e-12)
    gammas = []
    for _ in range(2):
        for _ in range(3):
            w.grad = torch.ones(2, dtype=torch.float64)
            optimizer.step()
        gammas.append(loop.settings.gamma)
    assert gammas == pytest.approx([2 / 3, 1.0], rel=1e-12)


def test_auto_gamma_measures_again_where_nothing_moved() -> None:
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.hamilton_jacobi(2, "auto"))
    for g in (0.0, 0.0, 1.0, 1.0):
        assert loop.gamma_start is None
        w.grad = torch.full((1,), g)
        optimizer.step()
    assert loop.gamma_start == pytest.approx(0.5)  # |mean gradient| 1, distance 2


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


def test_parle_on_one_replica_is_the_loop_without_elasticity() -> None:
    ends = []
    for rho, mean in ((0.0, None), (0.5, None), (0.5, lambda tensors: [t.clone() for t in tensors])):
        net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], le.parle(3, 0.5, rho), replica_mean=mean)
        for i in range(10):
            step(net, optimizer, i)
        ends.append(values(loop.anchor))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def test_rho_one_forgets_all_but_the_loops_own_move() -> None:
    """x <- mean of the old anchors - (x - z): here the other replica stands at zero, so the mean is x / 2."""
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, le.elastic_sgd(2, 1.0), replica_mean=two_replicas)
    path = []
    for _ in range(4):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    assert path == [7, 2, 1, -1]  # 8 -> 7 -> 6 - 4 = 2; 2 -> 1 -> 0 - 1 = -1
    assert loop.outer_step == 2


def test_the_mean_of_the_anchors_starts_a_loop_ahead_and_is_waited_for_once() -> None:
    events: list[str] = []

    def replica_mean(tensors: list[Tensor]) -> Any:
        events.append("start")

        def wait() -> list[Tensor]:
            events.append("wait")
            return [t / 2 for t in tensors]

        return wait

    net, optimizer, _ = start(OPTIMIZERS["sgd"], le.elastic_sgd(3, 0.5), replica_mean=replica_mean)
    for i in range(7):
        step(net, optimizer, i)
        events.append(str(i))
    assert events == ["start", "0", "1", "wait", "2", "start", "3", "4", "wait", "5", "start", "6"]


@pytest.mark.parametrize("relaxation", [le.elastic_sgd(3, 0.5), le.parle(3, 0.5, 0.5), le.local_sgd(3), le.diloco(3)])
def test_a_parameter_unfrozen_in_the_middle_of_a_loop_with_replicas(relaxation: le.Relaxation) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.Relaxation())
    loop.detach()
    net.b.requires_grad_(False)
    loop = le.relax(optimizer, relaxation, replica_mean=two_replicas)
    for i in range(9):
        if i == 4:
            net.b.requires_grad_(True)
        step(net, optimizer, i)
    assert loop.outer_step == 3
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_the_outer_optimizer_may_be_any() -> None:
    for make in (OPTIMIZERS[n] for n in OPTIMIZERS if not n.startswith("lbfgs")):
        net, optimizer, loop = start(OPTIMIZERS["sgd"], le.lookahead(2), outer=make)
        for i in range(5):
            step(net, optimizer, i)
        assert loop.outer_step == 2
        assert not torch.equal(loop.anchor[0], Net().a)


def test_an_outer_optimizer_that_needs_a_closure_is_refused() -> None:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="outer must"):
        le.relax(optimizer, le.lookahead(2), outer=torch.optim.LBFGS)


@pytest.mark.parametrize("method", ["entropy_sgd", "hamilton_jacobi", "heat"])
def test_weights_loaded_and_saved_while_x_is_shown_are_the_new_x(method: str) -> None:
    relaxation = RELAXATIONS[method]
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


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_write_into_perturbed_weights_is_an_error_that_leaves_x(inner_steps: int) -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(inner_steps, 100.0))
    step(net, optimizer, 0)
    x = values(loop.anchor)
    with torch.no_grad():
        net.b.clamp_(-1e-3, 1e-3)
    loss_of(net, 1).backward()
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"):
        optimizer.step()
    assert_equal(net.parameters(), x)
    step(net, optimizer, 1)
    with loop.at_anchor(), torch.no_grad():
        net.b.zero_()
    assert loop.anchor[1].abs().max() == 0


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


def test_sparse_adam_takes_no_mean_of_gradients() -> None:
    optimizer = torch.optim.SparseAdam(torch.nn.Embedding(5, 2, sparse=True).parameters())
    with pytest.raises(ValueError, match="inner_steps must be 1 for the heat variant with SparseAdam"):
        le.relax(optimizer, le.heat(3))
    le.relax(optimizer, le.heat(1))


def test_an_outer_momentum_of_another_library_is_a_float_in_the_state() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.hamilton_jacobi(2, outer_momentum=np.float64(0.9)))
    for i in range(3):
        step(net, optimizer, i)
    assert through_a_file(loop.state_dict())["outer"]["options"][0]["momentum"] == 0.9


def test_weights_loaded_with_replicas_are_not_pulled_to_the_mean_of_the_old_ones() -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], lr=0.0)
    loop = le.relax(optimizer, le.parle(2), replica_mean=lambda tensors: [t.clone() for t in tensors])
    for _ in range(3):
        w.grad = torch.ones(2)
        optimizer.step()
    with loop.at_anchor(), torch.no_grad():
        w.fill_(100.0)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(loop.anchor[0], torch.full((2,), 100.0))


def test_looking_at_perturbed_weights_that_were_written_is_the_error_too() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(1, 100.0))
    step(net, optimizer, 0)
    x = values(loop.anchor)
    with torch.no_grad():
        net.b.zero_()
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"), loop.at_anchor():
        pass
    assert_equal(net.parameters(), x)
    step(net, optimizer, 1)


def test_a_parameter_frozen_while_it_is_perturbed_is_no_write() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], le.heat(1, 100.0))
    step(net, optimizer, 0)
    with torch.no_grad():
        net.b.add_(0)
    net.b.requires_grad_(False)
    loss_of(net, 1).backward()
    optimizer.step()
    with loop.at_anchor():
        assert torch.equal(net.b, loop.anchor[1])
