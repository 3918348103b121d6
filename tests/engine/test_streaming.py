"""Fragments that take their outer steps in turn, some steps after their exchange has begun."""

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine import loop as engine
from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.engine.streaming import Phase, StreamingRule, balanced, phases
from tests.engine.methods_table import OPTIMIZERS
from tests.engine.training import Net, assert_equal, start, step, two_replicas, values


def best(sizes: list[int], parts: int) -> int:
    """The smallest largest part, by trying all."""
    if parts == 1:
        return sum(sizes)
    cuts = range(1, len(sizes) - parts + 2)
    return min(max(sum(sizes[:i]), best(sizes[i:], parts - 1)) for i in cuts)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_fragments_are_neighbours_and_the_largest_is_as_small_as_can_be(parts: int) -> None:
    g = torch.Generator().manual_seed(parts)
    for _ in range(30):
        sizes = torch.randint(0, 20, (6,), generator=g).tolist()
        found = balanced(sizes, parts)
        assert found == sorted(found) and set(found) == set(range(parts))
        assert max(sum(s for s, p in zip(sizes, found, strict=True) if p == i) for i in range(parts)) == best(
            sizes, parts
        )
    assert balanced([], parts) == []


@pytest.mark.parametrize("inner_steps", [1, 5, 6])
def test_every_fragment_has_its_turn_once_a_loop(inner_steps: int) -> None:
    for fragments in range(1, 9):
        for delay in range(inner_steps):
            found = phases(inner_steps, fragments, delay)
            assert found[-1].use == inner_steps
            for phase in found:
                assert 1 <= phase.start <= inner_steps and 1 <= phase.use <= inner_steps
                assert (phase.use - phase.start - delay) % inner_steps == 0


def test_what_is_unfinished() -> None:
    """Of loops of 6: used after steps 3, 9, ...; or begun after 5, so that the first use is after 9."""
    usual, late = Phase(start=2, use=3), Phase(start=5, use=3)
    assert [n for n in range(13) if not usual.unfinished(*divmod(n, 6), 6)] == [0, 3, 9]
    assert [n for n in range(13) if not late.unfinished(*divmod(n, 6), 6)] == [0, 9]


def by_eye(relaxation: le.Relaxation, steps: int) -> tuple[list[float], list[float]]:
    """x and y of one weight that the optimizer moves by -1 a step."""
    w = torch.nn.Parameter(torch.tensor([16.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    loop = le.relax(optimizer, relaxation)
    xs, ys = [], []
    for _ in range(steps):
        w.grad = torch.ones(1)
        optimizer.step()
        xs.append(loop.anchor[0].item())
        ys.append(w.item())
    return xs, ys


def streaming(inner_steps: int, fragments: int, delay: int, mixing: float, outer_lr: float = 1.0) -> le.Relaxation:
    return le.streaming_diloco(inner_steps, fragments, delay, mixing, outer_lr=outer_lr, outer_momentum=0.0)


def test_by_eye() -> None:
    """Sent after step 2: 16 - 14. Used after step 3: x is 14, and y, which is 13, goes half way to it."""
    assert by_eye(streaming(3, 1, 1, 0.5), 6) == ([16, 16, 14, 14, 14, 11.5], [15, 14, 13.5, 12.5, 11.5, 11])
    # Without mixing the third step is lost; with all of it y goes its way.
    assert by_eye(streaming(3, 1, 1, 0.0), 6) == ([16, 16, 14, 14, 14, 12], [15, 14, 14, 13, 12, 12])
    assert by_eye(streaming(3, 1, 1, 1.0), 6) == ([16, 16, 14, 14, 14, 11], [15, 14, 13, 12, 11, 10])


def train(relaxation: le.Relaxation, steps: int, name: str = "adamw", **options: Any) -> list[list[Tensor]]:
    net, optimizer, loop = start(OPTIMIZERS[name], relaxation, **options)
    path = []
    for i in range(steps):
        step(net, optimizer, i)
        path.append(values([*net.parameters(), *loop.anchor]))
    loop.close()
    return [*path, values(loop.anchor)]


@pytest.mark.parametrize("replica_mean", [None, two_replicas])
def test_one_fragment_without_delay_and_mixing_is_diloco(monkeypatch: pytest.MonkeyPatch, replica_mean: Any) -> None:
    """The plain rule runs it; and the streaming rule, made to, has the same numbers."""
    expected = train(le.diloco(4), 10, replica_mean=replica_mean)
    assert le.streaming_diloco(4, 1, 0, 0.0) == le.diloco(4)
    monkeypatch.setattr(engine, "OuterRule", StreamingRule)
    ours = train(le.diloco(4), 10, replica_mean=replica_mean)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0 if replica_mean else 1e-15)


@pytest.mark.parametrize("replica_mean", [None, two_replicas])
def test_all_of_y_kept_is_a_loop_that_does_not_reset(replica_mean: Any) -> None:
    options: dict[str, Any] = {"inner_steps": 3, "elastic_target": "pseudo_gradient", "outer_lr": 0.5}
    kept = train(le.Relaxation(**options, mixing=1.0), 9, replica_mean=replica_mean)
    expected = train(le.Relaxation(**options, reset=False), 9, replica_mean=replica_mean)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-15)


def test_a_training_that_ends_closes_every_fragment_with_all_its_steps() -> None:
    """After step 4 of 6: one fragment was used after step 3, the other is under way since step 4."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], streaming(6, 2, 2, 0.5), replica_mean=two_replicas)
    for i in range(4):
        step(net, optimizer, i)
    assert list(loop.under_way) == [1] and loop.unfinished
    x, y = values(loop.anchor), values(net.parameters())
    loop.close()
    expected = [a - (a - b) / 2 for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(values(loop.anchor), expected, rtol=0, atol=1e-15)
    assert_equal(net.parameters(), loop.anchor)
    assert not loop.under_way and not loop.unfinished


def test_a_loop_that_has_just_ended_is_closed_where_a_fragment_has_not() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], streaming(6, 2, 0, 0.0))
    for i in range(6):
        step(net, optimizer, i)
    assert loop.inner_step == 0 and loop.unfinished
    (x, done), y = values(loop.anchor), values(net.parameters())
    assert not torch.equal(x, y[0]) and torch.equal(done, y[1])
    loop.close()
    torch.testing.assert_close(values(loop.anchor), y, rtol=0, atol=1e-15)
    assert loop.shows_anchor
    loop.close()  # nothing more to end
    torch.testing.assert_close(values(loop.anchor), y, rtol=0, atol=1e-15)


def test_weights_that_are_frozen_while_their_steps_are_under_way_are_closed_with_them() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], streaming(4, 1, 2, 0.5))
    for i in range(2):
        step(net, optimizer, i)
    assert list(loop.under_way) == [0]
    net.a.requires_grad_(False)
    optimizer.zero_grad()
    step(net, optimizer, 2)
    y = values(net.parameters())
    loop.close()
    torch.testing.assert_close(values(loop.anchor), y, rtol=0, atol=1e-15)


def test_fragments_follow_the_module_and_not_the_optimizers_groups() -> None:
    """The last layer is the first group; each exchange is of one layer, and of both its tensors."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD([{"params": net[1].parameters()}, {"params": net[0].parameters()}], lr=0.1)
    sent: list[list[tuple[int, ...]]] = []

    def mean(of: int) -> Callable[[list[Tensor]], list[Tensor]]:
        def replica_mean(tensors: list[Tensor]) -> list[Tensor]:
            sent.append([(of,), *(tuple(t.shape) for t in tensors)])
            return tensors

        return replica_mean

    loops = ModuleLoops(net, [optimizer], streaming(2, 2, 0, 0.0), replica_mean=[[mean(0), mean(1)]])
    for _ in range(2):
        loops.prepare()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert sent == [[(0,), (3, 2), (3,)], [(1,), (2, 3), (2,)]]


def test_frozen_weights_are_not_in_a_fragment() -> None:
    given: list[int] = []

    def mean(tensors: list[Tensor]) -> list[Tensor]:
        given.append(sum(t.numel() for t in tensors))
        return tensors

    net = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 1))
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    le.relax(optimizer, streaming(2, 2, 0, 0.0), replica_mean=mean)
    for _ in range(2):
        net(torch.ones(1, 9)).sum().backward()
        optimizer.step()
    assert given == [9, 1]


def test_what_is_loaded_while_an_exchange_is_under_way_is_not_moved_by_it() -> None:
    net, optimizer, loop = start(OPTIMIZERS["sgd"], streaming(4, 1, 2, 0.5), replica_mean=two_replicas)
    for i in range(3):
        step(net, optimizer, i)
    assert list(loop.under_way) == [0]
    with loop.at_anchor(), torch.no_grad():
        net.a.fill_(0.25)
    step(net, optimizer, 3)
    a, b = loop.anchor
    assert (a == 0.25).all() and not torch.equal(b, Net().b)


def test_a_step_whose_mean_cannot_be_had_is_put_off() -> None:
    """x stays, y goes on, and what was sent then is in the next exchange: 8 - 4 after the fourth step."""
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    given: list[float] = []

    def replica_mean(steps: list[Tensor]) -> Any:
        given.append(steps[0].item())
        found = None if len(given) == 1 else steps
        return lambda: found

    loop = le.relax(optimizer, streaming(3, 1, 1, 0.0), replica_mean=replica_mean)
    path = []
    for _ in range(6):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    assert given == [2, 5] and path == [7, 6, 5, 4, 3, 3] and loop.anchor[0].item() == 3


def test_a_state_of_other_fragments_goes_on() -> None:
    """What was under way and has no fragment any more is measured again; x and y are where they were."""
    net, optimizer, loop = start(OPTIMIZERS["sgd"], streaming(6, 2, 4, 0.5), replica_mean=two_replicas)
    for i in range(5):
        step(net, optimizer, i)
    assert sorted(loop.under_way) == [0, 1]
    state = loop.state_dict()
    for relaxation in (streaming(6, 1, 1, 0.5), streaming(6, 2, 1, 0.0), le.diloco(6), streaming(3, 2, 2, 0.5)):
        new, new_optimizer, other = start(OPTIMIZERS["sgd"], relaxation, seed=5, replica_mean=two_replicas)
        other.load_state_dict(state)
        assert_equal([*new.parameters(), *other.anchor], [*net.parameters(), *loop.anchor])
        for i in range(5, 20):
            step(new, new_optimizer, i)
        other.close()
        assert all(x.isfinite().all() for x in other.anchor)
        assert not any("sent" in slot for slot in other.state_dict()["slots"].values())


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="fragments must be at most the number of the optimizer's parameters, 2, got"):
        start(OPTIMIZERS["sgd"], streaming(6, 3, 0, 0.0))


# Against torchft's own

BATCHES = 24


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()


def descend(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    optimizer.zero_grad()
    (net(x) - x.sin()).square().sum().backward()
    optimizer.step()


@functools.cache
def of_torchft(inner_steps: int, fragments: int, delay: int, mixing: float, share: float) -> Any:
    """y after every step and the backups after it, of a replica whose peers stand still: their mean is its share."""
    local_sgd = pytest.importorskip("torchft.local_sgd")
    from torchft.manager import Manager

    manager: Any = create_autospec(Manager, instance=True)
    manager._use_async_quorum = False
    commits = 0

    def commit() -> bool:
        nonlocal commits
        commits += 1
        return True

    manager.should_commit.side_effect = commit
    manager.current_step.side_effect = lambda: commits
    manager.allreduce.side_effect = lambda tensor, **_: (
        tensor.mul_(share) is not None and create_autospec(torch.distributed.Work, instance=True)
    )
    net = layers()
    parts = [net] if fragments == 1 else [net[0], net[2]]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    outers = [torch.optim.SGD(p.parameters(), lr=0.7, momentum=0.9, nesterov=True) for p in parts]
    ys, xs = [], []
    with local_sgd.DiLoCo(
        manager,
        parts,
        optimizer,
        outers,
        inner_steps,
        fragment_sync_delay=delay,
        fragment_update_alpha=mixing,
    ) as diloco:
        for i in range(BATCHES):
            descend(net, optimizer, i)
            ys.append(values(net.parameters()))
            xs.append(values(x for f in diloco._fragments for x in f.original_parameters.values()))
    return xs, ys


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("mixing", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("fragments", "delay"), [(1, 0), (1, 5), (2, 0), (2, 1), (2, 2)])
def test_torchft_has_the_same_numbers(fragments: int, delay: int, mixing: float, share: float) -> None:
    """At every step: the weights that train, and those that its backups hold."""
    xs, ys = of_torchft(6, fragments, delay, mixing, share)
    net = layers()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    loop = le.relax(
        optimizer,
        le.streaming_diloco(6, fragments, delay, mixing),
        replica_mean=lambda tensors: lambda: [share * t for t in tensors],
    )
    for i in range(BATCHES):
        descend(net, optimizer, i)
        torch.testing.assert_close(values(loop.anchor), xs[i], rtol=0, atol=1e-14)
        torch.testing.assert_close(values(net.parameters()), ys[i], rtol=0, atol=1e-14)
