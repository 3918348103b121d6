"""What a native kernel is given: a row per parameter, if the parameter is one for it."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_entropy.engine.gaussian import Place, Share, Source
from lightning_entropy.engine.noise import seed_of

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_TYPES = {Tensor, torch.nn.Parameter}  # a subclass may keep its numbers elsewhere
_LAYOUTS = {torch.strided}
_layout, _device, _dtype = attrgetter("layout"), attrgetter("device"), attrgetter("dtype")
_LIMIT = 1 << 32  # weights: the kernels count them in 32 bits


class Update(NamedTuple):
    """The numbers of torch.optim.SGD; where there is no gradient they mean nothing."""

    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: float = 0.0  # or not


class Noise(NamedTuple):
    """The size of a parameter's noise, the two keys it is drawn with, and where it begins in what these draw."""

    scale: float = 0.0
    keys: tuple[int, int] = (0, 0)
    start: int = 0


class Numbers(NamedTuple):
    """What a step does to a parameter: the optimizer's update, the fraction of the way to x in [0, 1), noise."""

    update: Update
    pull: float
    noise: Noise


class Tensors(NamedTuple):
    """A parameter's, of which a kernel is for none or all; None where there is none."""

    y: Tensor
    x: Tensor
    z: Tensor | None = None
    momentum: Tensor | None = None
    gradient: Tensor | None = None


class Places(NamedTuple):
    """Where the parameters of a launch are, which hardly ever changes.

    Attributes:
        addresses: of y, x, z and momentum of each, 0 where there is none; no two of one y.
        sizes: of each.
        aligned: whether all addresses are multiples of 16.
    """

    addresses: list[tuple[int, ...]]
    sizes: list[int]
    aligned: bool


class Kernel(Protocol):
    """A native inner step for one kind of device."""

    def run(
        self,
        device: torch.device,
        places: Places,
        gradients: Sequence[int],
        numbers: Sequence[Numbers],
        average: float,
    ) -> None:
        """Advance parameters.

        Args:
            device: where they are.
            places: of them on it.
            gradients: the address of each one's, 0 where there is none.
            numbers: of each.
            average: weight of the newest y in z.
        """
        ...


MakeKernel = Callable[[Iterable[torch.device]], Kernel]  # builds it, for these devices of its kind


class Tables:
    """The last few lists of parameters that came, with what a kernel takes of each.

    A step's list is nearly always that of the step before, and what a kernel takes of it is a function of its tensors'
    types, devices, shapes, strides and addresses alone. So these are compared, by calls that loop in C, and where they
    are the same only the numbers are new, and the addresses of the gradients.

    Args:
        kernels: by kind of device.

    Attributes:
        built: how many lists have been looked at in full.
    """

    LAST = 4  # the optimizer's whole step, what follows another's, and a perturbation

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels = kernels
        self._last: list[tuple[list[Any], dict[torch.device, _Part]]] = []
        self.built = 0

    def run(self, tensors: Sequence[Tensors], numbers: Sequence[Numbers], average: float) -> list[int]:
        """Advance those parameters for which there is a kernel where they are, one call for every device.

        Args:
            tensors: of each.
            numbers: of each.
            average: weight of the newest y in z.

        Returns:
            Which they are: whose tensors are all float32 in one order in memory.
        """
        taken: list[int] = []
        for device, part in self._parts(tensors).items():
            found = (tensors[i].gradient for i in part.indices)
            gradients = [0 if g is None else g.data_ptr() for g in found]
            self._kernels[device.type].run(device, part.places, gradients, [numbers[i] for i in part.indices], average)
            taken += part.indices
        if taken:
            torch.autograd.graph.increment_version([tensors[i].y for i in taken])
        return taken

    def _parts(self, tensors: Sequence[Tensors]) -> "dict[torch.device, _Part]":
        if not tensors:
            return {}
        look = _look(tensors)
        found = next((parts for known, parts in self._last if known == look), None)
        if found is None:
            found = _sorted_out(tensors, self._kernels)
            self.built += 1
            if look is not None:
                self._last = [(look, found), *self._last[: self.LAST - 1]]
        return found


class _Part(NamedTuple):
    """The parameters on one device that its kernel takes."""

    indices: list[int]
    places: Places


def _look(tensors: Sequence[Tensors]) -> list[Any] | None:
    """Return all that a kernel's choice depends on; None where a tensor is of a kind that cannot be asked."""
    columns: list[Sequence[Tensor | None]] = list(zip(*tensors, strict=True))
    some = [t for column in columns for t in column if t is not None]
    if not (_TYPES.issuperset(map(type, some)) and _LAYOUTS.issuperset(map(_layout, some))):
        return None
    kept = [t for column in columns[:-1] for t in column if t is not None]
    gradients = [t for t in columns[-1] if t is not None]  # allocated anew at every step, wherever there is room
    return [
        list(map(Tensor.data_ptr, kept)),
        [address != 0 for address in map(Tensor.data_ptr, gradients)],
        [t is None for column in columns for t in column],
        list(map(_device, some)),
        list(map(_dtype, some)),
        list(map(Tensor.is_neg, some)),
        list(map(Tensor.size, some)),
        list(map(Tensor.stride, some)),
    ]


def _sorted_out(tensors: Sequence[Tensors], kernels: Mapping[str, Kernel]) -> dict[torch.device, _Part]:
    """Return the parameters for which there is a kernel, by device."""
    chosen: dict[torch.device, dict[int, int]] = {}  # by the address of y: two at one cannot go side by side
    for i, some in enumerate(tensors):
        y = some.y
        if y.device.type in kernels and y.numel() < _LIMIT and all(t is None or _is_like(t, y) for t in some):
            chosen.setdefault(y.device, {}).setdefault(y.data_ptr(), i)
    parts = {}
    for device, rows in chosen.items():
        indices = list(rows.values())
        addresses = [tuple(0 if t is None else t.data_ptr() for t in tensors[i][:-1]) for i in indices]
        aligned = all(address % 16 == 0 for row in addresses for address in row)
        parts[device] = _Part(indices, Places(addresses, [tensors[i].y.numel() for i in indices], aligned))
    return parts


def noise_of(scale: float, seeds: Sequence[Source] | None, i: int) -> Noise | None:
    """Return the noise of the i-th parameter; None where it is part of another's, as kernels count from its start."""
    if seeds is None:
        return Noise()
    source = seeds[i]
    if isinstance(source, Share):
        return None
    first = source[0]
    return Noise(scale, _keys(first), source.start if isinstance(source, Place) else 0)


@functools.lru_cache(maxsize=16)  # parameters of a chunk, and a step, have one
def _keys(seed: int) -> tuple[int, int]:
    return seed, seed_of(seed, 1)


def _is_like(t: Tensor, y: Tensor) -> bool:
    """Whether a tensor's numbers are float32, lie in memory as they are, and do so where and as y's do."""
    if type(t) not in _TYPES or t.layout is not torch.strided or t.dtype is not torch.float32 or t.device != y.device:
        return False
    if t.is_neg() or (t.data_ptr() == 0 and t.numel() > 0):
        return False
    return _same_order(y, t)


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, are dense and lie in memory in the same order."""
    formats = _FORMATS if a.dim() in (4, 5) else _FORMATS[:1]
    alike = (a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f) for f in formats)
    return a.shape == b.shape and any(alike)
