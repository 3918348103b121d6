"""The loops of a module's optimizers: shown, hidden, saved and loaded together."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.module_loops import ModuleLoops
from tests.engine.methods_table import METHODS
from tests.engine.training import Net, assert_equal, loss_of, through_a_file, values


class Pair(torch.nn.Module):
    """Two nets with an optimizer each, a buffer and a parameter of no optimizer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.left, self.right = Net(seed), Net(seed)
        self.spare = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))


Started = tuple[Pair, list[torch.optim.Optimizer], ModuleLoops]


def started(relaxation: le.Relaxation, steps: int = 0, seed: int = 0, **options: Any) -> Started:
    pair = Pair(seed)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (pair.left, pair.right)
    ]
    loops = ModuleLoops(pair, optimizers, relaxation, **{"seed": 3, **options})
    train(pair, optimizers, loops, range(steps))
    return pair, optimizers, loops


def train(pair: Pair, optimizers: list[torch.optim.Optimizer], loops: ModuleLoops, steps: Any) -> None:
    for i in steps:
        loops.prepare()
        for net, optimizer in zip((pair.left, pair.right), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, i).backward()
            optimizer.step()


def state_of(pair: Pair) -> list[Tensor]:
    return values(pair.state_dict().values())


@pytest.mark.parametrize("method", ["entropy_sgd", "heat_averaged", "smoothed", "two_timescale"])
def test_the_state_dict_is_what_one_sees_when_x_is_shown(method: str) -> None:
    pair, optimizers, loops = started(METHODS[method])
    for i in range(7):
        train(pair, optimizers, loops, [i])
        loops.prepare()
        saved = state_of(pair)
        loops.show()
        assert_equal(saved, state_of(pair))
        assert_equal(pair.left.parameters(), loops.loops[0].anchor)
        assert_equal(pair.right.parameters(), loops.loops[1].anchor)
        loops.hide()
        assert_equal(saved, state_of(pair))


def test_each_optimizer_draws_noise_of_its_own() -> None:
    """The two nets, and their batches, are alike."""
    pair, _, _ = started(METHODS["hamilton_jacobi"], 3)
    assert torch.equal(pair.left.a, pair.right.a)
    pair, _, loops = started(METHODS["entropy_sgd"], 1)
    assert not torch.equal(pair.left.a, pair.right.a)
    assert [loop.state_dict()["seed"] for loop in loops.loops] == [3, 3 + (1 << 64)]


def test_the_states_keys_are_the_parameters_names() -> None:
    _, _, loops = started(METHODS["entropy_sgd"], 2)
    assert [list(state["slots"]) for state in loops.state_dict()] == [["left.a", "left.b"], ["right.a", "right.b"]]
    assert "anchor" not in loops.state_dict()[0]["slots"]["left.a"]  # it is in the module's


@pytest.mark.parametrize("steps", [0, 2, 3, 4])
@pytest.mark.parametrize("method", ["entropy_sgd", "heat_averaged", "smoothed", "smoothed_filter"])
def test_going_on_from_the_modules_and_the_loops_state_is_exact(method: str, steps: int) -> None:
    pair, optimizers, loops = started(METHODS[method], steps)
    saved = through_a_file([pair.state_dict(), loops.state_dict(), *(o.state_dict() for o in optimizers)])
    train(pair, optimizers, loops, range(steps, steps + 6))
    new, new_optimizers, new_loops = started(METHODS[method], 1, seed=5)
    new.load_state_dict(saved[0])
    new_loops.load_state_dict(saved[1])
    for optimizer, state in zip(new_optimizers, saved[2:], strict=True):
        optimizer.load_state_dict(state)
    train(new, new_optimizers, new_loops, range(steps, steps + 6))
    assert_equal(state_of(new), state_of(pair))


def test_another_number_of_states_is_refused() -> None:
    _, _, loops = started(METHODS["entropy_sgd"], 1)
    with pytest.raises(ValueError, match="must be of 2 optimizers, got 1"):
        loops.load_state_dict(loops.state_dict()[:1])
    with pytest.raises(ValueError, match="got format 99"):
        loops.load_state_dict([{**state, "format": 99} for state in loops.state_dict()])


def test_other_values_are_shown_in_the_place_of_x_and_of_what_no_loop_tracks() -> None:
    pair, _, loops = started(METHODS["entropy_sgd"], 2)
    before, x = values([*pair.parameters(), pair.count]), values(loops.loops[0].anchor)
    mean = torch.full_like(pair.left.a, 0.5)
    loops.show({pair.left.a: mean, pair.spare: torch.tensor([4.0]), pair.count: torch.tensor([5.0])})
    assert torch.equal(pair.left.a, mean)
    assert torch.equal(pair.left.b, x[1])
    assert (pair.spare.item(), pair.count.item(), loops.shown) == (4, 5, True)
    assert_equal(loops.loops[0].anchor, x)
    assert pair.state_dict()["left.a"][0, 0] == 0.5
    loops.show()  # a checkpoint within a validation
    loops.hide()
    assert (pair.spare.item(), loops.shown) == (4, True)
    pair.count.fill_(6.0)  # as BatchNorm would
    loops.hide()
    assert_equal([*pair.parameters()], before[:-1])
    assert (pair.count.item(), loops.shown) == (6, False)


def test_the_next_batch_finds_y_whoever_looks() -> None:
    pair, _, loops = started(METHODS["entropy_sgd"], 2)
    y = values(pair.parameters())
    for _ in range(3):
        loops.show()
    loops.prepare()
    assert not loops.shown
    assert_equal(pair.parameters(), y)


def test_perturbed_weights_that_were_written_are_shown_by_neither_loop() -> None:
    pair, _, loops = started(METHODS["smoothed"], 2)
    loops.prepare()
    with torch.no_grad():
        pair.right.a.zero_()
    with pytest.raises(RuntimeError, match="modified while they were perturbed"):
        loops.show()
    assert not loops.shown
    assert not any(loop.weights.shown for loop in loops.loops)


def test_perturbations_are_taken_out_when_a_batch_has_ended() -> None:
    pair, _, loops = started(METHODS["smoothed"], 4)
    y = values(pair.parameters())
    loops.prepare()
    assert not torch.equal(pair.left.a, y[0])
    loops.unperturb()
    assert_equal(pair.parameters(), y)
    loops.prepare()
    with torch.no_grad():
        pair.right.a.zero_()
    loops.unperturb(check=False)
    assert_equal(pair.parameters(), y)


def test_a_table_whose_rows_its_forward_pass_clips_may_be_perturbed() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 2, max_norm=0.1), torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loops = ModuleLoops(module, [optimizer], le.heat(1, 100.0))
    for _ in range(3):
        loops.prepare()
        optimizer.zero_grad()
        module(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
        loops.unperturb()


def test_whose_x_is_asked_for() -> None:
    pair, _, loops = started(METHODS["entropy_sgd"], 1)
    assert loops.anchor_of(pair.right.b) is loops.loops[1].weights[pair.right.b].anchor
    assert loops.tracks(pair.left.a)
    assert not loops.tracks(pair.spare)
    assert loops.anchor_of(pair.spare) is None
    loops.show()
    assert loops.anchor_of(pair.right.b) is None


def test_detach_leaves_x_and_no_hook() -> None:
    pair, optimizers, loops = started(METHODS["smoothed"], 2)
    loops.prepare()
    x = state_of(pair)
    loops.detach()
    loops.detach()
    assert_equal(state_of(pair), x)
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in pair.modules())


def test_a_refusal_leaves_every_optimizer_and_the_module_alone() -> None:
    pair = Pair()
    first = torch.optim.SGD(pair.left.parameters(), lr=0.1)
    second = torch.optim.LBFGS(pair.right.parameters())
    with pytest.raises(ValueError, match="coupled must be False with LBFGS"):
        ModuleLoops(pair, [first, second], le.entropy_sgd(coupled=True))
    assert not first._optimizer_step_pre_hooks
    assert not any(m._state_dict_hooks for m in pair.modules())


def test_a_mean_over_replicas_of_each_optimizer() -> None:
    sent: list[tuple[int, int]] = []

    def mean_of(i: int) -> Any:
        return lambda tensors: [sent.append((i, len(tensors))), tensors][1]

    pair, optimizers, loops = started(le.elastic_sgd(2, 0.5), replica_mean=[mean_of(0), mean_of(1)])
    loops.prepare()
    assert sent == [(0, 2), (1, 2)]
    train(pair, optimizers, loops, range(2))
    assert sent == [(0, 2), (1, 2)]
    loops.prepare()
    assert sent == [(0, 2), (1, 2)] * 2


def test_what_is_logged() -> None:
    pair, optimizers, loops = started(METHODS["entropy_sgd"])
    for loop in loops.loops:
        loop.measure = True
    train(pair, optimizers, loops, range(7))
    metrics = loops.metrics()
    names = ("gamma", "rho", "outer_step", "inner_distance", "mean_distance")
    assert set(metrics) == {f"entropy/{i}/{name}" for i in range(2) for name in names}
    assert metrics["entropy/1/outer_step"] == 2
    assert metrics["entropy/0/gamma"] == 0.5
    one = ModuleLoops(net := Net(), [torch.optim.SGD(net.parameters(), lr=0.1)], le.lookahead(3))
    assert one.metrics() == {"entropy/gamma": 0, "entropy/rho": 0, "entropy/outer_step": 0}


def test_distances_are_what_one_computes_from_x_y_and_z() -> None:
    pair, optimizers, loops = started(le.Relaxation(inner_steps=3, gamma=0.5, average=0.5, reset=False))
    loop = loops.loops[0]
    train(pair, optimizers, loops, range(2))
    x = values(loop.anchor)
    loop.measure = True
    train(pair, optimizers, loops, [2])  # y is not reset, and x is z
    n = sum(t.numel() for t in x)
    for measured, to in zip(loop.distances or (), (values(pair.left.parameters()), loop.anchor), strict=True):
        squares = sum((a - b).square().sum() for a, b in zip(to, x, strict=True))
        torch.testing.assert_close(measured, (squares / n) ** 0.5)


def test_a_copied_module_has_no_loop() -> None:
    pair, _, loops = started(METHODS["entropy_sgd"], 2)
    twin = copy.deepcopy(pair)
    assert torch.equal(twin.state_dict()["left.a"], pair.left.a)
    assert not torch.equal(pair.state_dict()["left.a"], pair.left.a)
    assert loops.tracks(pair.left.a)
