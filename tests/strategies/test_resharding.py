"""What ranks have saved of their shards, put together for others: each number where it was in the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies.compression import share_size
from lightning_entropy.strategies.resharding import Part, Place, UnknownPlaceError, resharded

SHAPES = {"a": (70, 60), "b": (5, 90), "c": (3,), "d": ()}  # of which a rank's part is rows, columns, or nothing
PARAMS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
REPLICAS = 3


def place(name: str, ranks: int, rank: int) -> Place:
    """As torch.chunk splits: the rows, of b the columns; d is on the first rank alone, as a part of one number."""
    shape = SHAPES[name]
    start, stop = [0] * len(shape), list(shape)
    if shape:
        dim = 1 if name == "b" else 0
        size = -(-shape[dim] // ranks)
        start[dim], stop[dim] = min(rank * size, shape[dim]), min((rank + 1) * size, shape[dim])
    return {"name": name, "shape": list(shape), "start": start, "stop": stop}


def cut(whole: Tensor, where: Place) -> Tensor:
    return whole[tuple(slice(a, b) for a, b in zip(where["start"], where["stop"], strict=True))]


def numbers(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def line(whole: dict[str, Tensor], ranks: int, rank: int) -> Tensor:
    """A rank's parts one after the other, as they are exchanged."""
    return torch.cat([cut(whole[name], place(name, ranks, rank)).reshape(-1) for name in SHAPES])


def share(whole: dict[str, Tensor], ranks: int, rank: int, replica: int) -> Tensor:
    """What a replica's rank has of numbers that are kept once for all replicas."""
    own = line(whole, ranks, rank)
    size = share_size(own.numel(), REPLICAS)
    padded = torch.nn.functional.pad(own, (0, REPLICAS * size - own.numel()))
    return padded.view(REPLICAS, -1)[replica].view(1, -1)


X, MEAN, ERRORS = numbers(1), numbers(2), numbers(3)


def saved(ranks: int, replica: int, rank: int) -> dict[str, Any]:
    """What a rank has saved: weights, a momentum, what it has exchanged, and what is its own."""
    own = {name: place(name, ranks, rank) for name in SHAPES}
    return {
        "loops": [{"slots": {name: {"anchor": cut(X[name], own[name]), "moved": True} for name in SHAPES}}],
        "checkpoint": {"optimizer_states": [{"state": {1: {"m": cut(X["b"], own["b"]), "step": torch.tensor(7.0)}}}]},
        "places": {f"/loops/0/slots/{name}/anchor": own[name] for name in SHAPES}
        | {"/checkpoint/optimizer_states/0/state/1/m": own["b"]},
        "couplings": [
            {
                "mean": line(MEAN, ranks, rank),
                "residual": line(numbers(10 + replica), ranks, rank),
                "share": share(ERRORS, ranks, rank, replica),
            },
            {"mean": None, "residual": None, "share": None},
        ],
        "layouts": [list(own.values()), list(own.values())],
        "module": {"buffer": torch.tensor([float(rank)])},
        "rng": {"cpu": torch.tensor([rank])},
    }


def load(ranks: int, *, replica: int = 1, position: int = 0, shares: bool = False, **kwargs: Any) -> Any:
    def read(replica: int, rank: int) -> dict[str, Any]:
        return saved(ranks, replica, rank)

    return resharded(
        kwargs.get("read", read),
        kwargs.get("params", PARAMS),
        replica=replica,
        position=position,
        replicas=REPLICAS,
        ranks=ranks,
        shares=shares,
    )


@pytest.mark.parametrize("replica", range(REPLICAS))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_rank_has_all_that_several_had(ranks: int, replica: int) -> None:
    state, kept = load(ranks, replica=replica)
    assert kept
    for name in SHAPES:
        assert torch.equal(state["loops"][0]["slots"][name]["anchor"], X[name])
    assert torch.equal(state["checkpoint"]["optimizer_states"][0]["state"][1]["m"], X["b"])
    assert state["checkpoint"]["optimizer_states"][0]["state"][1]["step"] == 7
    memory = state["couplings"][0]
    assert torch.equal(memory["mean"], line(MEAN, 1, 0))
    assert torch.equal(memory["residual"], line(numbers(10 + replica), 1, 0))
    assert torch.equal(memory["share"], share(ERRORS, 1, 0, replica))
    assert memory["share"].count_nonzero() > 0
    assert state["couplings"][1] == {"mean": None, "residual": None, "share": None}


@pytest.mark.parametrize(("then", "now"), [(4, 3), (2, 3), (1, 2), (3, 3)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_part_is_put_together_from_those_that_have_some_of_it(then: int, now: int, name: str) -> None:
    for rank in range(now):
        part = Part(place(name, now, rank), X[name])
        for d in range(then):
            part.take(cut(X[name], place(name, then, d)), place(name, then, d))
        assert torch.equal(part.whole(name), cut(X[name], place(name, now, rank)))


def test_a_part_of_which_some_has_not_come_is_unknown() -> None:
    part = Part(place("a", 1, 0), X["a"])
    part.take(cut(X["a"], place("a", 2, 0)), place("a", 2, 0))
    with pytest.raises(UnknownPlaceError, match="a"):
        part.whole("a")


def test_what_is_no_shard_is_of_the_same_position_or_of_the_first() -> None:
    second, third = (load(2, position=position)[0] for position in (1, 2))
    assert (second["module"]["buffer"].item(), second["rng"]["cpu"].item()) == (1, 1)
    assert third["module"]["buffer"].item() == 0
    assert "rng" not in third  # two ranks would draw the same


def test_a_parameter_of_another_name_or_shape_is_unknown() -> None:
    for params in (PARAMS | {"a": torch.zeros(71, 60)}, {k: v for k, v in PARAMS.items() if k != "a"}):
        with pytest.raises(UnknownPlaceError, match="/loops/0/slots/a/anchor"):
            load(2, params=params)


def test_a_memory_of_which_the_parts_are_not_known_is_left_out() -> None:
    def read(replica: int, rank: int) -> dict[str, Any]:
        return {**saved(2, replica, rank), "layouts": [None, None]}

    for options in ({"read": read}, {"shares": True}):
        state, kept = load(2, **options)
        assert not kept
        assert state["couplings"] == [{"mean": None, "residual": None, "share": None}] * 2
        assert torch.equal(state["loops"][0]["slots"]["a"]["anchor"], X["a"])
