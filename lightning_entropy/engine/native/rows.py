"""What a native kernel is given: a row per parameter, if the parameter is one for it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_entropy.engine.gaussian import Place, Share, Source
from lightning_entropy.engine.noise import seed_of

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_TYPES = (Tensor, torch.nn.Parameter)  # a subclass may keep its numbers elsewhere
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


class Row(NamedTuple):
    """One parameter: the addresses of y, x, z, momentum and gradient, 0 where there is none; its size; numbers."""

    addresses: tuple[int, ...]
    size: int
    update: Update
    pull: float
    noise: Noise


class Kernel(Protocol):
    """A native inner step for one kind of device."""

    def run(self, device: torch.device, rows: Sequence[Row], average: float) -> None:
        """Advance parameters.

        Args:
            device: where they are.
            rows: no two at one address.
            average: weight of the newest y in z.
        """
        ...


MakeKernel = Callable[[Iterable[torch.device]], Kernel]  # builds it, for these devices of its kind


class Rows:
    """The rows of one step, one per parameter.

    Args:
        kernels: by kind of device.
    """

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels = kernels
        # By the parameter's address: two at the same one cannot go side by side.
        self._rows: dict[torch.device, dict[int, Row]] = {}
        self._params: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor | None], update: Update, pull: float, noise: Noise | None) -> bool:
        """Queue a parameter if there is a kernel where it is and all its tensors are float32 in one order in memory.

        Args:
            tensors: y, x, z, momentum and gradient; None where there is none.
            update: of the optimizer.
            pull: the fraction of the way to x, in [0, 1).
            noise: None: no kernel has it.

        Returns:
            Whether it was added.
        """
        y = tensors[0]
        assert y is not None
        device = y.device
        if noise is None or device.type not in self._kernels:
            return False
        if not _plain(y, device) or y.numel() >= _LIMIT or not _same_order(y, y):
            return False
        size, stride = y.numel(), y.stride()
        for t in tensors[1:]:
            if t is None:
                continue
            if not _plain(t, device) or t.numel() != size or (t.stride() != stride and not _same_order(y, t)):
                return False
        addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
        rows = self._rows.setdefault(device, {})
        if addresses[0] in rows:
            return False
        rows[addresses[0]] = Row(addresses, size, update, pull, noise)
        self._params.append(y)
        return True

    def run(self, average: float) -> None:
        """Call the kernels, one time for every device."""
        for device, rows in self._rows.items():
            self._kernels[device.type].run(device, list(rows.values()), average)
        if self._params:
            torch.autograd.graph.increment_version(self._params)


def noise_of(scale: float, seeds: Sequence[Source] | None, i: int) -> Noise | None:
    """Return the noise of the i-th parameter; None where it is part of another's, as kernels count from its start."""
    if seeds is None:
        return Noise()
    source = seeds[i]
    if isinstance(source, Share):
        return None
    first = source[0]
    return Noise(scale, (first, seed_of(first, 1)), source.start if isinstance(source, Place) else 0)


def _plain(t: Tensor, device: torch.device) -> bool:
    """Whether a tensor's numbers are float32 and lie in the memory of a device as they are."""
    if type(t) not in _TYPES or t.layout is not torch.strided or t.dtype is not torch.float32 or t.device != device:
        return False
    return not t.is_neg() and (t.data_ptr() != 0 or t.numel() == 0)


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, are dense and lie in memory in the same order."""
    formats = _FORMATS if a.dim() in (4, 5) else _FORMATS[:1]
    alike = (a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f) for f in formats)
    return a.shape == b.shape and any(alike)
