"""What replicas see, and that their loaders end together."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lightning_entropy as le
from lightning_entropy.strategies.loaders import same_in_replica
from lightning_entropy.strategies.options import Grid
from tests.strategies.runs import FORK_WARNINGS, SAMPLES, Net, Samples, data, fit, strategy

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


PARLE = le.parle(4, 0.1, 0.3, 0.25)


def epochs(rank: dict[str, Any], length: int) -> list[list[int]]:
    seen = rank["seen"]
    return [seen[i : i + length] for i in range(0, 2 * length, length)]


def test_every_replica_sees_all_data_in_its_own_order(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE, replicas=2), 4, make=partial(Net, batch=4))
    orders = [epochs(rank, SAMPLES // 2) for rank in ranks]
    for epoch in range(2):
        whole = [sorted(orders[a][epoch] + orders[a + 1][epoch]) for a in (0, 2)]
        assert whole == [list(range(SAMPLES))] * 2
        assert orders[0][epoch] != orders[2][epoch]
    assert orders[0][0] != orders[0][1]


def test_shards_are_disjoint(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE, data="shard"), 2)
    for epoch in range(2):
        halves = [epochs(rank, SAMPLES // 2)[epoch] for rank in ranks]
        assert sorted(halves[0] + halves[1]) == list(range(SAMPLES))


class Uneven(Net):
    """As many batches as the rank says; without a length, or with."""

    def __init__(self, batches: list[int | None], sized: bool) -> None:
        super().__init__()
        self.batches, self.sized = batches, sized

    def train_dataloader(self) -> Any:
        n = self.batches[self.trainer.global_rank]
        return DataLoader(Samples(8 * (n or 0)), 8) if self.sized else DataLoader(Endless(n), batch_size=None)


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, n: int | None) -> None:
        self.n = n

    def __iter__(self) -> Any:
        i = 0
        while self.n is None or i < self.n:
            yield data(8, seed=i)
            i += 1


def test_loaders_of_different_lengths_end_with_the_shortest_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"have \[8, 5\] batches by rank: an epoch ends with the shortest, after 5"):
        fit(tmp_path, strategy(PARLE), 2, make=lambda: Uneven([8, 5], sized=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = fit(tmp_path, strategy(PARLE), 2, make=lambda: Uneven([8, 5], sized=True))
    assert [len(rank["iterates"]) for rank in ranks] == [10, 10]
    ranks = fit(tmp_path, strategy(PARLE), 2, make=lambda: Uneven([8, 5], sized=True), limit_train_batches=5)
    assert [len(rank["iterates"]) for rank in ranks] == [10, 10]


@pytest.mark.parametrize("batches", [[8, 5], [4, 9], [None, 6]])
def test_loaders_of_unknown_length_end_with_the_first(tmp_path: Path, batches: list[int | None]) -> None:
    ranks = fit(tmp_path, strategy(PARLE), 2, make=lambda: Uneven(batches, sized=False), max_epochs=2)
    shortest = min(n for n in batches if n is not None)
    assert [len(rank["iterates"]) for rank in ranks] == [2 * shortest, 2 * shortest]


def test_ranks_of_a_replica_that_share_a_plan_see_the_same() -> None:
    sampled = [same_in_replica(Grid(rank, 4, 2), own=own) for rank in range(4) for own in (True, False)]
    assert sampled[0] == sampled[2] != sampled[4] == sampled[6]  # the whole set, in an order of each replica's own
    assert [s["num_replicas"] for s in sampled] == [1, 2] * 4
    assert [s["rank"] for s in sampled[1::2]] == [0, 0, 1, 1]
