r"""An inner step in one pass over memory, for ``compile=True``.

What an inner step does to a weight is a dozen operations on five numbers, and costs what it takes to fetch them. The
kernel here does all of it while they are in registers: the pull, the noise and the running mean and, where the user's
optimizer is plain ``torch.optim.SGD``, its update too. Then the gradient is withheld from the optimizer for this
step, so that nothing is updated twice, and given back. The noise is a counter hashed and put through the inverse of the
normal distribution function, so that no pass is spent on drawing it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_entropy import functional as F
from lightning_entropy.slots import Slot

LEAST = 1 << 16  # weights below which a call of the kernel costs more than it saves


class CompiledStep:
    """Do with large float32 parameters what :func:`functional.inner_move_` does, and leave it the others.

    The first steps compile, on the CPU with a C++ compiler; one kernel serves every size. Its noise is N(0, 1) and
    a function of (seed, step, weight) as the other's is, but other numbers.
    """

    def __init__(self) -> None:
        self._kernel = torch.compile(_kernel, dynamic=True, fullgraph=True)
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._flats: dict[Tensor, tuple[list[int], list[Any] | None]] = {}

    def move_(
        self,
        params: Sequence[Tensor],
        anchors: Sequence[Tensor],
        averages: Sequence[Tensor] | None,
        *,
        stiffness: Sequence[float | Tensor],
        noise: Sequence[float | Tensor],
        average: float,
        seeds: Sequence[Sequence[int]] | None,
    ) -> None:
        """Pull, shake and average, in place; arguments as :func:`functional.inner_move_`."""
        rest, constants = [], _Constants()
        for i, (y, x) in enumerate(zip(params, anchors, strict=True)):
            flats = self._flat(y, x, None if averages is None else averages[i], None)
            k: Any = stiffness[i]
            if flats is None or isinstance(k, Tensor) or isinstance(noise[i], Tensor):
                rest.append(i)
                continue
            numbers = constants(k / (1 + k), noise[i], average)
            flat_y, flat_x, z, m = flats
            self._kernel(flat_y, flat_x, z, m, None, numbers, _keys(seeds, i), False)
        F.inner_move_(
            [params[i] for i in rest],
            [anchors[i] for i in rest],
            None if averages is None else [averages[i] for i in rest],
            stiffness=[stiffness[i] for i in rest],
            noise=[noise[i] for i in rest],
            average=average,
            seeds=None if seeds is None else [seeds[i] for i in rest],
        )

    def sgd_(
        self,
        optimizer: Optimizer,
        slots: Sequence[Slot],
        averages: Sequence[Tensor] | None,
        *,
        stiffness: Sequence[float | Tensor],
        noise: Sequence[float | Tensor],
        average: float,
        seeds: Sequence[Sequence[int]] | None,
    ) -> None:
        """Take the whole inner step where the optimizer is plain SGD; until :meth:`release` it has no gradient there.

        The first step of a parameter, which makes its momentum, is the optimizer's own.

        Args:
            optimizer: the user's.
            slots: of the parameters that have a gradient.
            averages: as in :func:`functional.inner_move_`, also ``stiffness``, ``noise``, ``average`` and ``seeds``.
            stiffness: k.
            noise: s.
            average: weight of the newest y.
            seeds: of the noise.
        """
        if type(optimizer) is not SGD or getattr(optimizer, "grad_scale", None) is not None:
            return
        constants = _Constants()
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for i, slot in enumerate(slots):
            p, group = slot.param, group_of[slot.param]
            m = optimizer.state.get(p, {}).get("momentum_buffer") if group["momentum"] else None
            if (
                group["maximize"]
                or group["dampening"]
                or isinstance(group["lr"], Tensor)
                or isinstance(noise[i], Tensor)
            ):
                continue
            if group["momentum"] and m is None:
                continue
            flats = self._flat(p, slot.anchor, None if averages is None else averages[i], m)
            g = p.grad
            if flats is None or g is None or g.dtype != p.dtype or g.layout != p.layout or g.stride() != p.stride():
                continue
            k: Any = stiffness[i]
            numbers = constants(k / (1 + k), noise[i], average, group["lr"], group["weight_decay"], group["momentum"])
            y, x, z, m = flats
            self._kernel(y, x, z, m, _gradient(g), numbers, _keys(seeds, i), group["nesterov"])
            self._withheld.append((p, g))
            p.grad = None

    def forget(self) -> None:
        """Drop what an update that raised has left withheld: by now the gradients are other ones."""
        self._withheld = []

    def _flat(self, *tensors: Tensor | None) -> list[Any] | None:
        """View a parameter and what belongs to it as flat in one common order; None where the kernel is not for it."""
        param = tensors[0]
        assert param is not None
        places = [0 if t is None else t.data_ptr() for t in tensors]
        known = self._flats.get(param)
        if known is None or known[0] != places:
            known = self._flats[param] = (places, _flats(param, tensors))
        return known[1]

    def release(self) -> set[Tensor]:
        """Give the withheld gradients back.

        Returns:
            The parameters whose inner step is taken.
        """
        taken = set()
        for p, gradient in self._withheld:
            p.grad = gradient
            taken.add(p)
        self._withheld = []
        return taken


def _flats(param: Tensor, tensors: Sequence[Tensor | None]) -> list[Any] | None:
    if param.numel() < LEAST:
        return None
    flats: list[Any] = []
    for t in tensors:
        if t is None:
            flats.append(None)
            continue
        flat = F.flat(t)
        if flat is None or t.dtype != torch.float32 or t.stride() != param.stride():
            return None
        flats.append(flat.data)  # no view, or the compiler makes a kernel for every shape of what is viewed
    return flats


def _gradient(g: Tensor) -> Tensor:
    flat = F.flat(g)
    assert flat is not None  # its strides are the parameter's, which has a flat view
    return flat.data


class _Constants(dict[tuple[Any, ...], Tensor]):
    """Tensors of a few numbers each, made once a step for all parameters that share them."""

    def __call__(self, *numbers: Any) -> Tensor:
        if numbers not in self:
            self[numbers] = torch.tensor(numbers)
        return self[numbers]


def _keys(seeds: Sequence[Sequence[int]] | None, i: int) -> Tensor | None:
    """Give the two 32-bit keys of a parameter's noise."""
    if seeds is None:
        return None
    first = seeds[i][0]
    return torch.tensor([_signed(first), _signed(F.seed_of(first, 1))], dtype=torch.int32)


def _signed(unsigned: int) -> int:
    return (unsigned + 2**31) % 2**32 - 2**31


def _kernel(
    y: Tensor,
    x: Tensor,
    z: Tensor | None,
    m: Tensor | None,
    g: Tensor | None,
    numbers: Tensor,
    keys: Tensor | None,
    nesterov: bool,
) -> None:
    """Update y, and z and m where they are, from (pull, noise, average[, lr, weight decay, momentum])."""
    new = y
    if g is not None:
        g = g + numbers[4] * y
        if m is not None:
            buffer = numbers[5] * m + g
            m.copy_(buffer)
            g = g + numbers[5] * buffer if nesterov else buffer
        new = y - numbers[3] * g
    new = new + numbers[0] * (x - new)
    if keys is not None:
        new = new + numbers[1] * hashed_normal(y.numel(), keys)
    y.copy_(new)
    if z is not None:
        z.copy_(z + numbers[2] * (new - z))


def hashed_normal(n: int, keys: Tensor) -> Tensor:
    """Give n numbers N(0, 1), each a function of its position and the keys, in elementwise operations alone.

    A 32-bit hash of the position, with a key in each of its first two rounds; its upper 24 bits as a uniform number
    in (-1, 1); and Giles' polynomials for the inverse error function. Within +-5.42, and exact to float32.

    Args:
        n: how many, < 2^31.
        keys: (2,) int32.

    Returns:
        (n,) float32.

    References:
        Giles, Approximating the erfinv function, GPU Computing Gems 2, 2011; Wellons, hash prospector ("lowbias32").
    """
    h = torch.arange(n, dtype=torch.int32, device=keys.device)
    h = (h ^ keys[0]) * 0x7FEB352D
    h = ((h ^ ((h >> 16) & 0xFFFF)) + keys[1]) * _signed(0x846CA68B)
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _signed(0x9E3779B1)
    h = h ^ ((h >> 16) & 0xFFFF)
    return inverse_normal(((h >> 8).to(torch.float32) + 0.5) * 2.0**-23)


def inverse_normal(u: Tensor) -> Tensor:
    """Give sqrt(2) erfinv(u), which is N(0, 1) where u is uniform in (-1, 1), to 2e-6.

    Args:
        u: float32, any shape, |u| < 1.

    Returns:
        Same shape.

    Example:
        >>> inverse_normal(torch.tensor([0.0, 0.6826895]))  # within one standard deviation
        tensor([0.0000, 1.0000])
    """
    w = -torch.log((1 - u) * (1 + u))
    # erfinv(u) / u: one polynomial in w - 5/2 for w < 5, another in sqrt(w) - 3 beyond.
    centre = _polynomial(w - 2.5, _CENTRE)
    tail = _polynomial(torch.sqrt(w) - 3.0, _TAIL)
    return 2**0.5 * u * torch.where(w < 5, centre, tail)


_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate by Horner's rule, highest power first."""
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = c + value * x
    return value
