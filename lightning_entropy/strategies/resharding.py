"""A replica's state as its ranks have saved it, each its shards, for other ranks than those: any number of them.

Every file says where in the whole its parts are. Whoever loads it copies from each what is in a part of its own, file
by file, so that a rank never has more than one of them and its part in memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_entropy.engine.shards import Region, mapped, region_of
from lightning_entropy.strategies.compression import share_size

# Where a part is: the name of its parameter, the shape of the whole, and where the part starts and stops.
Place = dict[str, Any]

Read = Callable[[int, int], dict[str, Any]]  # the file of a replica's rank, by their numbers

MEMORY = ("mean", "residual", "share")  # of a stream of exchanges, see Memory


class UnknownPlaceError(Exception):
    """It is not known which part of what a rank has saved."""


def place_of(name: str | None, param: Tensor) -> Place:
    """Return where this rank's part of a parameter, or of a tensor that is placed as one, is.

    Example:
        >>> place_of("a", torch.zeros(3, 2))
        {'name': 'a', 'shape': [3, 2], 'start': [0, 0], 'stop': [3, 2]}
    """
    region = region_of(param) or Region(tuple(param.shape), tuple(slice(0, n) for n in param.shape))
    start, stop = [s.start for s in region.slices], [s.stop for s in region.slices]
    return {"name": name, "shape": list(region.shape), "start": start, "stop": stop}


def places_of(state: Any, names: Sequence[Sequence[str]]) -> dict[str, Place]:
    """Return where the parts of shards in a nested state are, by the keys that lead to them.

    Args:
        state: with the Trainer's checkpoint under "checkpoint".
        names: of the parameters, optimizer by optimizer, in the order of their states in it.
    """
    known = {name for own in names for name in own}
    found: dict[str, Place] = {}

    def note(path: str, t: Tensor) -> Tensor:
        if isinstance(t, DTensor):
            found[path] = place_of(_name(path.split("/")[1:], names, known), t)
        return t

    mapped(state, note)
    return found


def _name(keys: list[str], names: Sequence[Sequence[str]], known: set[str]) -> str | None:
    """Return the name of the parameter that a tensor in a state is of; None where it is of none that is known."""
    if keys[:2] == ["checkpoint", "optimizer_states"] and keys[3:4] == ["state"]:
        return names[int(keys[2])][int(keys[4])]
    return next((key for key in keys if key in known), None)


class Part:
    """A part that is put together from others.

    Args:
        where: it is.
        like: a tensor of its type.
    """

    def __init__(self, where: Place, like: Tensor) -> None:
        self.where, self.values = where, torch.zeros(_shape(where), dtype=like.dtype)
        self._missing = self.values.numel()

    def take(self, values: Tensor, where: Place) -> None:
        """Copy what another part of the same tensor has of it."""
        start = [max(a, b) for a, b in zip(self.where["start"], where["start"], strict=True)]
        stop = [min(a, b) for a, b in zip(self.where["stop"], where["stop"], strict=True)]
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return
        into, of = (
            self_or_other[tuple(slice(a - s, b - s) for a, b, s in zip(start, stop, at["start"], strict=True))]
            for self_or_other, at in ((self.values, self.where), (values, where))
        )
        into.copy_(of)
        self._missing -= into.numel()

    def whole(self, what: str) -> Tensor:
        """Return it.

        Raises:
            UnknownPlaceError: not all of it has come.
        """
        if self._missing > 0:
            raise UnknownPlaceError(what)
        return self.values


def _shape(where: Place) -> list[int]:
    return [b - a for a, b in zip(where["start"], where["stop"], strict=True)]


def resharded(
    read: Read,
    params: Mapping[str, Tensor],
    *,
    replica: int,
    position: int,
    replicas: int,
    ranks: int,
    shares: bool,
) -> tuple[dict[str, Any], bool]:
    """Return the state with which a rank goes on from those of other ranks, and whether all of it could be had.

    What is a rank's own and no shard (buffers, where its loader was) is that of the same position, or of the first.

    Args:
        read: returns what a rank has saved.
        params: of this rank's module, by name.
        replica: this rank's.
        position: this rank's, in its replica.
        replicas: R, the same as then.
        ranks: of a replica that have saved it, each a part of the whole.
        shares: the ranks now exchange shares of weights that they all have, between which a rounding error that was
            left over is not divided: it is left out.

    Raises:
        UnknownPlaceError: a part of a parameter that is not known, or has another shape now.
    """
    heir = position if position < ranks else 0
    mine = read(replica, heir)
    parts = {path: Part(_now(where, params, path), tensors(mine)[path]) for path, where in mine["places"].items()}
    streams = [
        Stream(memory, layout, params, keeps=layout is not None and not shares)
        for memory, layout in zip(mine["couplings"], mine["layouts"], strict=True)
    ]
    for d in range(ranks):
        own = mine if d == heir else read(replica, d)
        found = tensors(own)
        for path, part in parts.items():
            part.take(found[path], own["places"][path])
        column = [own["couplings"]]
        if any(stream.needs_all for stream in streams):
            column = [own["couplings"] if r == replica else read(r, d)["couplings"] for r in range(replicas)]
        for i, stream in enumerate(streams):
            stream.take([couplings[i] for couplings in column], own["couplings"][i], own["layouts"][i])
    state = mapped(mine, lambda path, t: parts[path].whole(path) if path in parts else t)
    state["couplings"] = [stream.memory(replica, replicas) for stream in streams]
    if position >= ranks:
        state.pop("rng", None)  # no two ranks draw the same numbers
    return state, all(stream.kept for stream in streams)


def tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a nested state, by the keys that lead to them."""
    found: dict[str, Tensor] = {}
    mapped(state, found.setdefault)
    return found


def _now(where: Place, params: Mapping[str, Tensor], what: str) -> Place:
    """Return the place of this rank's part of a parameter that another rank had a part of."""
    name = where["name"]
    if name not in params or list(params[name].shape) != where["shape"]:
        raise UnknownPlaceError(what)
    return place_of(name, params[name])


class Stream:
    """The memory of one stream of exchanges, see :class:`Memory`, put together from that of other ranks.

    Args:
        memory: of one of them.
        layout: of the parts that its tensors consist of; None: it is not known.
        params: of this rank's module, by name.
        keeps: False leaves out what there is.

    Attributes:
        kept: whether nothing had to be left out.
    """

    def __init__(
        self, memory: Mapping[str, Any], layout: Sequence[Place] | None, params: Mapping[str, Tensor], *, keeps: bool
    ) -> None:
        having = [key for key in MEMORY if memory.get(key) is not None]
        self.kept = keeps or not having
        self._parts: dict[str, list[Part]] = {}
        if having and keeps:
            assert layout is not None
            now = [_now(where, params, "couplings") for where in layout]
            self._parts = {key: [Part(where, memory[key]) for where in now] for key in having}

    @property
    def needs_all(self) -> bool:
        """Whether other replicas have some of it: each the rounding error of its share of the sum."""
        return "share" in self._parts

    def take(self, column: Sequence[Mapping[str, Any]], own: Mapping[str, Any], layout: Sequence[Place] | None) -> None:
        """Copy what the ranks at one position have of it.

        Args:
            column: the memories of all replicas' ranks, in their order, where :attr:`needs_all`.
            own: that of this replica's.
            layout: of their parts.
        """
        for key, parts in self._parts.items():
            if layout is None:
                raise UnknownPlaceError("couplings")
            sizes = [math.prod(_shape(where)) for where in layout]
            line = own[key].view(-1)
            if key == "share":
                line = torch.cat([memory[key].view(-1) for memory in column])[: sum(sizes)]
            for part, values, where in zip(parts, line.split(sizes), layout, strict=True):
                part.take(values.view(_shape(where)), where)

    def memory(self, replica: int, replicas: int) -> dict[str, Tensor | None]:
        """Return this rank's."""
        found: dict[str, Tensor | None] = dict.fromkeys(MEMORY)
        for key, parts in self._parts.items():
            line = torch.cat([part.whole("couplings").reshape(-1) for part in parts])
            if key == "share":
                size = share_size(line.numel(), replicas)
                line = torch.nn.functional.pad(line, (0, size * replicas - line.numel()))
                line = line[replica * size : (replica + 1) * size].clone().view(1, -1)
            found[key] = line
        return found
