"""The exchange itself: what arrives is the mean, also of what rounding left out."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies import exchange
from lightning_entropy.strategies.compression import LEVELS, LEVELS_4, share_size
from lightning_entropy.strategies.exchange import Coupling, Memory
from lightning_entropy.strategies.flattened import squared_distance
from lightning_entropy.strategies.links import Links
from tests.device_calls import Calls, as_on_a_gpu, late_copy
from tests.engine.test_launches import resnet50
from tests.strategies.runs import FORK_WARNINGS, external

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


def values(rank: int, *, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(rank)
    return [scale * torch.randn(shape, generator=g) for shape in ((70, 41), (5,), ())]


def meet(n: int, work: Any, folder: Path) -> list[Any]:
    """Run ``work(rank)`` in a process group of n, and give what it returned on every rank."""

    def rank_work(rank: int) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=n)
        torch.save(work(rank), folder / f"{rank}.pt")

    assert external(n, rank_work) == [""] * n
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n)]


@pytest.mark.parametrize(("replicas", "data_parallel"), [(2, 1), (3, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_all_ranks_get_the_mean_to_the_bit(tmp_path: Path, replicas: int, data_parallel: int, format: Any) -> None:
    def work(rank: int) -> list[list[Tensor]]:
        coupling = Coupling(Links(replicas, data_parallel), format=format)
        return [coupling(values(10 * t + rank // data_parallel))() for t in range(3)]

    ranks = meet(replicas * data_parallel, work, tmp_path)
    for t in range(3):
        given = [values(10 * t + r) for r in range(replicas)]
        mean = [sum(parts) / replicas for parts in zip(*given, strict=True)]
        # The first round is whole; the others send differences of about 1 to 5, in 8 or 4 bits.
        most = 1e-6 if format == "float32" or t == 0 else 0.05 if format != "int4" else 1.0
        for rank in ranks:
            torch.testing.assert_close(rank[t], mean, rtol=0, atol=most)
            assert all(torch.equal(a, b) for a, b in zip(rank[t], ranks[0][t], strict=True))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("format", "step"), [("bfloat16", 2.0**-7), ("int8", 4 / LEVELS), ("int4", 8 / LEVELS_4)])
def test_what_rounding_leaves_out_is_sent_later(tmp_path: Path, n: int, format: Any, step: float) -> None:
    """The mean over rounds of the same values has the rounding error of one round, divided by their number."""
    rounds = 200

    def work(rank: int) -> list[Tensor]:
        coupling = Coupling(Links(n, 1), format=format, differences=False)
        total = [torch.zeros_like(t) for t in values(rank)]
        for _ in range(rounds):
            for part, mean in zip(total, coupling(values(rank))(), strict=True):
                part += mean / rounds
        return total

    ranks = meet(n, work, tmp_path)
    exact = [sum(parts) / n for parts in zip(*(values(rank) for rank in range(n)), strict=True)]
    for got, mean in zip(ranks[0], exact, strict=True):
        assert (got - mean).abs().max() < 3 * step / rounds + 1e-6


def test_differences_are_what_is_rounded(tmp_path: Path) -> None:
    """Large weights that hardly differ arrive with an error of their spread, not of their size."""

    def work(rank: int) -> list[Tensor]:
        coupling = Coupling(Links(2, 1), format="int8")
        start = [1000 + t for t in values(7)]
        coupling([s + t for s, t in zip(start, values(rank, scale=0.1), strict=True)])()
        return coupling([s + t for s, t in zip(start, values(2 + rank, scale=0.1), strict=True)])()

    got = meet(2, work, tmp_path)[0]
    around = zip(values(7), values(2, scale=0.1), values(3, scale=0.1), strict=True)
    exact = [1000 + s + (a + b) / 2 for s, a, b in around]
    for a, b in zip(got, exact, strict=True):
        assert (a - b).abs().max() < 0.01


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_what_is_not_finite_enters_no_mean(tmp_path: Path, data_parallel: int) -> None:
    """The weights together, further tensors each by itself; and one rank of a replica speaks for all of them."""

    def work(rank: int) -> list[Any]:
        replica = rank // data_parallel
        coupling = Coupling(Links(3, data_parallel))
        given = values(replica)
        if rank == 2 * data_parallel - 1:
            given[0][3, 3] = float("inf")
        wait = coupling(given)
        assert coupling.round is not None
        finite = coupling.round.finite
        statistics = torch.full((3,), torch.nan if rank == 0 else float(replica))
        mask = torch.tensor([0.0, -torch.inf])
        return [*wait(), finite, *coupling([*values(replica), statistics, mask], judged=3)()]

    ranks = meet(3 * data_parallel, work, tmp_path)
    two = [(a + b) / 2 for a, b in zip(values(0), values(2), strict=True)]
    three = [sum(parts) / 3 for parts in zip(*(values(r) for r in range(3)), strict=True)]
    for r, rank in enumerate(ranks):
        torch.testing.assert_close(rank[:3], two)
        assert rank[3] == (r // data_parallel != 1)
        torch.testing.assert_close(rank[4:7], three)
        assert rank[7].tolist() == [1.5] * 3
        assert rank[8].isnan().all()  # finite nowhere


def test_the_ranks_of_a_replica_all_know_it_at_once(tmp_path: Path) -> None:
    """They go back to the mean together, by collectives among themselves, so none may hear of it a step later."""

    def work(rank: int) -> list[Any]:
        with as_on_a_gpu():
            coupling, given = Coupling(Links(2, 2)), values(rank // 2)
            if rank == 3:
                given[0][3, 3] = float("nan")
            wait = coupling(given)
            assert coupling.round is not None
            return [coupling.round.finite, *wait()]

    for rank, found in enumerate(meet(4, work, tmp_path)):
        assert found[0] is (rank < 2)
        torch.testing.assert_close(found[1:], values(0))


@pytest.mark.parametrize("late", [False, True])
def test_one_that_does_not_count_keeps_its_rounding_error_and_its_distance(tmp_path: Path, late: bool) -> None:
    def work(rank: int) -> list[Any]:
        with as_on_a_gpu() if late else nullcontext():
            coupling = Coupling(Links(2, 1), format="int8")
            for t in range(2):
                mean = coupling(values(10 * t + rank))()
            own = squared_distance(values(10 + rank), torch.cat([m.reshape(-1) for m in mean])).item()
            left, given = coupling.memory.residual, values(20 + rank)
            if rank:
                given[1][0] = torch.inf
            coupling(given)()
            return [left, coupling.memory.residual, own, coupling.spread]

    (before, now, own, spread), (left, after, _, other) = meet(2, work, tmp_path)
    assert left.any() and torch.equal(left, after) and not torch.equal(before, now)
    assert spread == other == pytest.approx((own / (70 * 41 + 6)) ** 0.5)


def test_a_notice_reaches_all_ranks_in_the_same_round(tmp_path: Path) -> None:
    def work(rank: int) -> list[bool]:
        coupling, seen = Coupling(Links(2, 2)), []
        for t in range(3):
            coupling.notice = rank == 3 and t == 1
            coupling(values(0))()
            seen.append(coupling.noticed)
        return seen

    assert meet(4, work, tmp_path) == [[False, True, True]] * 4


class Done:
    """A collective that is over at once."""

    def wait(self) -> None: ...


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_the_begin_reads_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch, format: Any) -> None:
    """Tensors on the device "meta" raise an error where a value is asked for."""
    links = object.__new__(Links)
    vars(links).update(across=None, inside=None, replicas=2, data_parallel=1, position=0, by_host=True)
    vars(links).update(shares=False, sharded=False)
    monkeypatch.setattr(Links, "device_of", lambda self, values: values.device)
    monkeypatch.setattr(exchange, "to_host", late_copy)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    for name in ("all_reduce", "all_to_all_single", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *given, **options: Done())
    coupling, tensors = Coupling(links, format=format), [t.to("meta") for t in values(0)]
    size = sum(t.numel() for t in tensors)
    share = torch.zeros(1, share_size(size, 2), device="meta")
    for _ in range(2):
        with Calls() as calls:
            coupling(tensors)
        assert coupling.round is not None and coupling.round.finite is None
        assert not calls.waits
        coupling.memory = Memory(torch.zeros(size, device="meta"), torch.zeros(size, device="meta"), share)
        coupling.distance = torch.zeros(3, device="meta")
    if format == "float32":
        coupling([*tensors, torch.ones(3, device="meta"), torch.ones(0, device="meta")], judged=3)
    else:
        coupling.round.advance()  # what follows when the first half has arrived


def test_a_device_tells_late_whether_weights_are_finite(tmp_path: Path) -> None:
    def work(rank: int) -> list[Any]:
        with as_on_a_gpu():
            coupling, given = Coupling(Links(2, 1)), values(rank)
            if rank:
                given[0][3, 3] = float("nan")
            wait = coupling(given)
            assert coupling.round is not None
            before = coupling.round.finite
            means = wait()
            return [*means, before, coupling.round.finite]

    for rank, found in enumerate(meet(2, work, tmp_path)):
        torch.testing.assert_close(found[:3], values(0))
        assert found[3] is None and found[4] == (rank == 0)


# Of both halves of an exchange together, that it begins and that it is used: calls of torch, views left out.
MOST = {"float32": 14, "bfloat16": 25, "int8": 39, "int4": 49}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("format", MOST)
def test_an_exchange_makes_few_calls_whatever_the_number_of_tensors(tmp_path: Path, replicas: int, format: Any) -> None:
    def work(rank: int) -> list[int]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            for number in (10, 161):
                coupling = Coupling(Links(replicas, 1), format=format)
                for _ in range(3):  # the first is whole, the second has no rounding error before it
                    tensors = [torch.randn(shape).to(dtype) for shape in resnet50(1)[:number]]
                    with as_on_a_gpu(), Calls() as calls:
                        coupling(tensors)()
                found.append(calls.counted.total())
        return found

    for rank in meet(replicas, work, tmp_path):
        assert len(set(rank)) == 1 and rank[0] <= MOST[format], rank


def test_so_it_does_with_buffers(tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        found = []
        for number in (2, 106):  # of a ResNet-50's BatchNorm
            coupling, given = Coupling(Links(2, 1)), [*values(rank), *(torch.ones(n % 7) for n in range(number))]
            with Calls() as calls:
                coupling(given, judged=3)()
            found.append(calls.counted.total())
        return found

    for few, many in meet(2, work, tmp_path):
        assert few == many <= 36
