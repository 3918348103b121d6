"""Sharded parameters: every rule and outer step with the numbers of plain tensors, and what a part of a tensor is."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import lightning_entropy as le
from lightning_entropy.engine import gaussian, shards
from lightning_entropy.engine.shards import Region
from tests.engine import sharded
from tests.engine.sharded import NO_FSDP, SCENARIOS
from tests.strategies.runs import FORK_WARNINGS, external

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has seen, of all scenarios in one start."""
    folder = tmp_path_factory.mktemp("sharded")
    assert external(2, functools.partial(sharded.play, folder=folder, names=list(SCENARIOS))) == ["", ""]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@NO_FSDP
@pytest.mark.processes
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_have_the_numbers_of_one(told: list[dict[str, Any]], name: str) -> None:
    plain = sharded.train(SCENARIOS[name], sharded=False)
    for rank in told:
        for key in ("losses", "x", "shown", "distances", "final", "after"):
            close(rank[name][key], plain[key])


@NO_FSDP
@pytest.mark.processes
@pytest.mark.parametrize("name", SCENARIOS)
def test_whole_states_resume_with_another_number_of_ranks(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        close(rank[name]["resumed"], rank[name]["final"])
        close(sharded.resume(SCENARIOS[name], rank[name]["saved"], sharded.STEPS, sharded=False), rank[name]["final"])


@NO_FSDP
@pytest.mark.processes
def test_what_one_rank_alone_sees_written_is_written_for_all(told: list[dict[str, Any]]) -> None:
    assert [rank["written"] for rank in told] == [["1", "6"]] * 2  # by position


@NO_FSDP
@pytest.mark.processes
def test_weights_written_while_they_are_perturbed_are_an_error_on_every_rank(told: list[dict[str, Any]]) -> None:
    assert all("modified while they were perturbed" in rank["perturbed"] for rank in told)


@NO_FSDP
@pytest.mark.processes
def test_a_loop_over_shards_asks_for_the_module(told: list[dict[str, Any]]) -> None:
    assert all("module must be given" in rank["no module"] for rank in told)


@NO_FSDP
@pytest.mark.processes
def test_parts_that_are_yet_to_be_summed_are_refused_as_parameters(told: list[dict[str, Any]]) -> None:
    assert all("must be sharded or replicated" in rank["partial"] for rank in told)


@NO_FSDP
@pytest.mark.processes
def test_a_gradient_that_is_yet_to_be_summed_is_summed_once(told: list[dict[str, Any]]) -> None:
    assert [rank["gradient"] for rank in told] == [([2.0, 1.0], [2.0, 1.0])] * 2


# Parts, without processes


def mesh_parts(shape: tuple[int, ...], splits: list[tuple[bool, int, int]]) -> Iterator[tuple[Tensor, Region]]:
    """Cut a tensor by torch.chunk along mesh axes, the late ones last, as DTensors are; yield parts and regions."""
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    order = sorted(range(len(splits)), key=lambda axis: splits[axis][0])
    for index in torch.cartesian_prod(*(torch.arange(size) for _, _, size in splits)).view(-1, len(splits)).tolist():
        part = whole
        for axis in order:
            _, dim, size = splits[axis]
            chunks = part.chunk(size, dim)
            rank = index[axis]
            part = chunks[rank] if rank < len(chunks) else part.narrow(dim, 0, 0)
        ranked = tuple((late, dim, size, index[axis]) for axis, (late, dim, size) in enumerate(splits))
        yield part, shards._region(shape, ranked)


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((5, 3), [(False, 0, 2)]),
        ((5, 3), [(False, 0, 4)]),
        ((1,), [(False, 0, 2)]),
        ((4, 6), [(False, 1, 4)]),
        ((8, 6), [(True, 0, 2), (False, 0, 2)]),
        ((8, 6), [(False, 0, 2), (False, 0, 2)]),
        ((8, 6), [(False, 1, 3), (False, 0, 2)]),
    ],
)
def test_a_region_is_what_chunks_have(shape: tuple[int, ...], splits: list[tuple[bool, int, int]]) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    for part, region in mesh_parts(shape, splits):
        assert torch.equal(whole[region.slices], part)
        start, stop = region.span
        assert torch.isin(part, whole.view(-1)[start:stop]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize(
    ("shape", "splits"), [((7, 3), [(False, 0, 2)]), ((6, 4), [(False, 1, 2)]), ((5,), [(False, 0, 4)])]
)
@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_noise_of_the_parts_is_that_of_the_whole(
    dtype: torch.dtype, shape: tuple[int, ...], splits: list[tuple[bool, int, int]], chunk: bool, scaled: bool
) -> None:
    check_noise(dtype, shape, splits, chunk=chunk, scaled=scaled and len(shape) > 1)


@pytest.mark.parametrize(("shape", "splits"), [((1050, 1001), [(False, 0, 3)]), ((1050, 2000), [(False, 1, 2)])])
def test_noise_of_several_streams(shape: tuple[int, ...], splits: list[tuple[bool, int, int]]) -> None:
    check_noise(torch.float32, shape, splits, chunk=False, scaled=False)


def check_noise(
    dtype: torch.dtype, shape: tuple[int, ...], splits: list[tuple[bool, int, int]], *, chunk: bool, scaled: bool
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    scales = 0.1 + torch.arange(float(shape[0]), dtype=wide.to_real()).view(-1, *[1] * (len(shape) - 1))
    whole = torch.ones(shape, dtype=dtype)
    count = gaussian.numbers(whole)
    source: Any = gaussian.Place(3, 2, count + 5) if chunk else list(range(7, 7 + gaussian.streams(whole)))
    gaussian.shake_([whole], [wide], [scales if scaled else 0.5], [source])
    for part, region in mesh_parts(shape, splits):
        y = torch.ones(part.shape, dtype=dtype)
        s = scales[region.slices[0]] if scaled else 0.5
        gaussian.shake_([y], [wide], [s], [gaussian.Share(source, region)])
        assert torch.equal(y, whole[region.slices])
    assert not torch.equal(whole, torch.ones(shape, dtype=dtype))


def test_a_part_that_is_rows_draws_only_the_streams_that_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    inner = gaussian._shake_by_streams_
    monkeypatch.setattr(gaussian, "_shake_by_streams_", lambda jobs: (drawn.extend(j[3] for j in jobs), inner(jobs)))
    y = torch.zeros(512, 1024)
    region = Region((8192, 1024), (slice(1024, 1536), slice(0, 1024)))
    gaussian.shake_([y], [y.dtype], [1.0], [gaussian.Share(list(range(8)), region)])
    assert drawn == [1]


def test_a_plain_tensor_is_its_own_part() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    assert shards.local(p) is p
    assert shards.region_of(p) is None
    assert shards.whole(p, p) is p
    assert shards.part_of(p, p) is p
    assert shards.joined_norms([p], [p]) == [p]
    assert shards.anywhere([True, False], [p, p]) == [True, False]


def test_fsdps_placement_on_top_of_another_splits_last() -> None:
    from lightning_entropy.engine.torch_internals import splits_last

    placements = [_StridedShard(0, split_factor=2), Shard(0), Replicate(), Partial()]
    assert [splits_last(placement) for placement in placements] == [True, False, False, False]


def test_relax_takes_a_module_of_plain_tensors() -> None:
    net = torch.nn.Linear(1, 1)
    le.relax(torch.optim.SGD(net.parameters(), 0.1), le.lookahead(2), module=net)
