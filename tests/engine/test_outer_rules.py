"""The outer optimizer, and the mean over replicas that it is fed with."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.outer_rules import OuterStep, Replicas
from lightning_entropy.engine.weight import Weight
from lightning_entropy.methods.targets import OUTER_TARGETS
from tests.engine.methods_table import OPTIMIZERS, part
from tests.engine.training import Net, assert_equal, start, step, through_a_file, two_replicas, values


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


# The outer step and the mean themselves


def weights_at(*pairs: tuple[float, float]) -> list[Weight]:
    """Weights with these x and z."""
    return [
        Weight(torch.nn.Parameter(torch.tensor([z])), torch.tensor([x]), average=torch.tensor([z])) for x, z in pairs
    ]


def anchors(weights: list[Weight]) -> list[float]:
    return [w.anchor.item() for w in weights]


def named(weights: list[Weight]) -> list[tuple[str, Weight]]:
    return [(str(i), w) for i, w in enumerate(weights)]


def outer_step(outer: OuterStep, weights: list[Weight], pulls: list[Tensor | None], lr: float = 1.0) -> list[float]:
    outer.step(weights, named(weights), [w.mean for w in weights], pulls, lr)
    return anchors(weights)


def test_a_step_of_size_one_is_z_to_the_last_bit() -> None:
    weights = weights_at((0.1, 0.3), (1.0, float("inf")))
    assert outer_step(OuterStep(None, 0.0), weights, [None, None]) == [w.mean.item() for w in weights]


@pytest.mark.parametrize("kind", ["plain", "momentum", "factory"])
def test_a_step_by_eye(kind: str) -> None:
    """x - z = 4 and -2, pulls 2 and none, lr 1/2: 8 - 3 = 5, 1 + 1 = 2. With Nesterov 1/2 half as much again."""
    factory = {"factory": part(torch.optim.SGD, lr=0.5)}.get(kind)
    outer = OuterStep(factory, 0.5 if kind == "momentum" else 0.0)
    weights = weights_at((8.0, 4.0), (1.0, 3.0))
    pulls = [torch.tensor([2.0]), None]
    path = outer_step(outer, weights, pulls, lr=7.0 if kind == "factory" else 0.5)
    assert path == ([3.5, 2.5] if kind == "momentum" else [5, 2])
    assert all(w.anchor.grad is None for w in weights)
    assert (outer.optimizer is None) == (kind == "plain")


def test_an_anchor_that_comes_later_joins_and_the_state_goes_by_name() -> None:
    """Slope 2 all along: Nesterov 1/2 steps 3, 3.5, 3.75; from a state it goes on where it was."""
    weights = weights_at((0.0, -2.0), (0.0, -2.0))

    def go(outer: OuterStep, some: list[Weight]) -> None:
        means, pulls = [w.anchor - 2 for w in some], [None] * len(some)
        outer.step(some, named(weights), means, pulls, 1.0)

    outer = OuterStep(None, 0.5)
    go(outer, weights[:1])
    go(outer, weights)
    assert anchors(weights) == [-6.5, -3]
    state = through_a_file(outer.state_dict(named(weights)))
    assert set(state["state"]) == {"0", "1"}
    again = OuterStep(None, 0.5)
    again.load_state_dict(state)
    assert again.state_dict(named(weights)) == state  # until its first step it has what it was given
    go(again, weights)
    assert anchors(weights) == [-10.25, -6.5]
    assert OuterStep(None, 0.5).state_dict(named(weights)) is None


@pytest.mark.parametrize("bad", ["adam", lambda anchors: anchors, torch.optim.LBFGS])
def test_what_makes_no_outer_optimizer_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"outer must (be a callable|return a torch\.optim\.Optimizer)"):
        OuterStep(bad, 0.0)


def mean_with_zero(calls: list[list[float]], wait: bool) -> Any:
    """The other replica stands at zero."""

    def mean(tensors: list[Tensor]) -> Any:
        calls.append([t.item() for t in tensors])
        halves = [t / 2 for t in tensors]
        return (lambda: halves) if wait else halves

    return mean


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(
    ("target", "started", "sent", "means", "pulls"),
    [
        ("anchor", [[8, 1]], [[8, 1]], [4, 3], [2, 0.25]),  # half of the way from x to x / 2
        ("average", [], [[4, 3]], [4, 3], [3, -0.25]),  # and to z / 2
        ("pseudo_gradient", [], [[4, -2]], [6, 2], [None, None]),  # x - (x - z) / 2
    ],
)
def test_what_is_asked_of_the_replicas(
    target: str, started: list[Any], sent: list[Any], means: list[float], pulls: list[Any], wait: bool
) -> None:
    calls: list[list[float]] = []
    replicas = Replicas(mean_with_zero(calls, wait), OUTER_TARGETS[target])
    assert replicas
    weights = weights_at((8.0, 4.0), (1.0, 3.0))
    for _ in range(2):
        replicas.start(weights)
        replicas.start(weights)
        assert calls == started
        got_means, got_pulls = replicas.agree(weights, 0.0 if target == "pseudo_gradient" else 0.5)
        assert calls == sent
        assert [m.item() for m in got_means] == means
        assert [None if p is None else p.item() for p in got_pulls] == pulls
        calls.clear()


def test_one_replica_asks_nobody() -> None:
    weights = weights_at((8.0, 4.0))
    for name, pull in (("anchor", None), ("average", 2.0), ("pseudo_gradient", None)):
        replicas = Replicas(None, OUTER_TARGETS[name])
        assert not replicas
        replicas.start(weights)
        means, pulls = replicas.agree(weights, 0.0 if name == "pseudo_gradient" else 0.5)
        assert means[0].item() == 4
        assert pulls[0] is None if pull is None else pulls[0] == pull


def test_a_mean_under_way_is_waited_for_when_it_is_dropped_and_a_replaced_x_takes_no_part() -> None:
    waited: list[int] = []

    def mean(tensors: list[Tensor]) -> Any:
        copies = [t.clone() / 2 for t in tensors]
        return lambda: [waited.append(1), copies][1]

    replicas = Replicas(mean, OUTER_TARGETS["anchor"])
    weights = weights_at((8.0, 4.0), (6.0, 4.0), (9.0, 9.0))
    replicas.start(weights[:2])
    replicas.forget()
    assert waited == [1]
    replicas.forget()
    assert waited == [1]
    replicas.start(weights[:2])
    weights[0].replaced = True
    _, pulls = replicas.agree(weights, 1.0)  # the third was unfrozen since
    assert pulls[0] is None
    assert pulls[1] == 3
    assert pulls[2] is None
    replicas.start(weights)
    assert not weights[0].replaced


def descend(w: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    path = []
    for _ in range(steps):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    return path


def test_a_common_step_whose_mean_cannot_be_had_is_put_off_and_nothing_is_lost() -> None:
    """The other replica moves three times as far: with the first mean lost, the second covers both loops."""
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    given: list[float] = []

    def replica_mean(steps: list[Tensor]) -> list[Tensor] | None:
        given.append(steps[0].item())
        return None if len(given) == 1 else [2 * s for s in steps]  # mean of s and 3 s

    loop = le.relax(optimizer, le.local_sgd(2), replica_mean=replica_mean)
    assert descend(w, optimizer, 3) == [7, 6, 5]  # y goes on
    assert loop.anchor[0].item() == 8 and loop.outer_step == 1
    assert descend(w, optimizer, 1) == [0]  # 8 - 2 * 4
    assert given == [2, 4] and loop.outer_step == 2
    assert descend(w, optimizer, 2) == [-1, -4]


@pytest.mark.parametrize("target", ["anchor", "average"])
def test_a_pull_whose_mean_cannot_be_had_is_left_out_once(target: Any) -> None:
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    lost = iter([True, False])

    def replica_mean(tensors: list[Tensor]) -> Any:
        mean = None if next(lost) else [t / 2 for t in tensors]
        return lambda: mean

    le.relax(
        optimizer, le.Relaxation(inner_steps=2, average=1.0, rho=1.0, elastic_target=target), replica_mean=replica_mean
    )
    assert descend(w, optimizer, 2) == [7, 6]  # as if it were alone
    # 6 -> 5 -> 4 - (6 - 3) for the anchors, whose mean is 3; 4 - (6 - 2) for the averages, whose mean is 2
    assert descend(w, optimizer, 2) == [5, 1 if target == "anchor" else 0]
