"""What replicas start from: weights, seeds, random states."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_entropy as le
from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.start import initialize_apart, rng_state, seed_apart, set_rng_state, sync_weights
from tests.strategies.runs import FORK_WARNINGS, Net, external, fit, strategy

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


PARLE = le.parle(4, 0.1, 0.3, 0.25)


class Draws(L.Callback):
    """What this rank's generators give in the first batch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            import random

            import numpy as np

            record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
            record.extra["draws"] = [torch.rand(()).item(), np.random.rand(), random.random()]


@pytest.mark.processes
def test_random_numbers_differ_between_replicas_and_agree_inside(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(le.entropy_sgd(4, 0.1, 0.5), replicas=2), 4, callbacks=[Draws()])
    assert ranks[0]["draws"] == ranks[1]["draws"]
    assert ranks[2]["draws"] == ranks[3]["draws"]
    assert all(a != b for a, b in zip(ranks[0]["draws"], ranks[2]["draws"], strict=True))
    for a, b in ((0, 1), (2, 3)):  # noise: DDP never puts the weights of a replica's ranks together again
        for left, right in zip(ranks[a]["iterates"], ranks[b]["iterates"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


class First(L.Callback):
    """The weights as training finds them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
        record.extra["first"] = [p.detach().clone() for p in pl_module.parameters()]


@pytest.mark.processes
@pytest.mark.parametrize("apart", [False, True])
def test_where_replicas_start(tmp_path: Path, apart: bool) -> None:
    ranks = fit(tmp_path, strategy(PARLE, replicas=2, independent_init=apart), 4, callbacks=[First()])
    built = list(Net().parameters())
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["first"], built, strict=True))
    for rank in (1, 2, 3):
        same = [torch.equal(a, b) for a, b in zip(ranks[rank]["first"], ranks[0]["first"], strict=True)]
        assert all(same) if rank == 1 or not apart else not any(same)
    assert all(torch.equal(a, b) for a, b in zip(ranks[2]["first"], ranks[3]["first"], strict=True))


def test_weights_of_its_own_need_a_way_to_draw_them() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(Exception, match=r"independent_init needs reset_parameters\(\) .* 'odd' \(Odd\) has none"):
        initialize_apart(torch.nn.ModuleDict({"odd": Odd()}), 0)
    linear, state = torch.nn.Linear(2, 2), torch.get_rng_state()
    before = linear.weight.detach().clone()
    initialize_apart(linear, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(linear.weight, before)


class Kinds(torch.nn.Module):
    """Parameters and buffers of many kinds, with values of this rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(rank)
        draws = torch.randn(4, 3, 2, 2, generator=g)
        self.plain = torch.nn.Parameter(draws.clone())
        self.strided = torch.nn.Parameter(draws.clone().to(memory_format=torch.channels_last))
        self.rounded = torch.nn.Parameter(draws.to(torch.bfloat16))
        self.scalar = torch.nn.Parameter(draws.sum().double())
        self.frozen = torch.nn.Parameter(draws[0].clone(), requires_grad=False)
        self.register_buffer("mask", draws > 0)
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("phase", torch.complex(draws, -draws))
        self.register_buffer("empty", torch.zeros(0))


@pytest.mark.processes
def test_all_ranks_get_the_weights_of_the_first(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=3)
        module = Kinds(rank)
        pointers = [p.data_ptr() for p in module.parameters()]
        sync_weights(module)
        assert pointers == [p.data_ptr() for p in module.parameters()]
        assert module.strided.is_contiguous(memory_format=torch.channels_last)
        torch.save(module.state_dict(), tmp_path / f"{rank}.pt")
        torch.distributed.barrier()  # rank 0 has the store, which the others need until they have met

    assert external(3, work) == [""] * 3
    first = Kinds(0).state_dict()
    for rank in range(3):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state.keys() == first.keys()
        assert all(torch.equal(v, first[k]) and v.dtype == first[k].dtype for k, v in state.items())


def test_random_states_are_restored() -> None:
    state = rng_state()
    draws = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), draws)


@pytest.mark.parametrize(("grid", "seeded"), [(Grid(0, 2, 2), False), (Grid(1, 2, 2), True), (Grid(0, 2, 1), True)])
def test_only_a_first_replica_of_one_rank_keeps_its_random_state(grid: Grid, seeded: bool) -> None:
    before = torch.get_rng_state()
    seed_apart(grid, 11)
    assert torch.equal(before, torch.get_rng_state()) != seeded
    if seeded:
        assert torch.initial_seed() == grid.seed(11)


@pytest.mark.processes
def test_a_job_of_replicas_that_come_and_go_needs_their_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://127.0.0.1:1")
    with pytest.raises(Exception, match="TORCHFT_LIGHTHOUSE is set, and membership is 'static'"):  # a warning, there
        fit(tmp_path, strategy(PARLE), 2)
