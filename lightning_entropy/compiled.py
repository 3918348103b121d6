r"""An inner step in one pass over memory, for ``compile=True``.

What an inner step does to a weight is a dozen operations on five numbers, and costs what it takes to fetch them. The
kernel here does all of it while they are in registers: the pull, the noise and the running mean and, where the user's
optimizer is plain ``torch.optim.SGD``, its update too. Then the gradient is withheld from the optimizer for this
step, so that nothing is updated twice, and given back. The noise is a hashed counter made Gaussian two numbers at a
time, so that no pass is spent on drawing it; so a parameter's two halves go through the kernel side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_entropy import functional as F
from lightning_entropy.slots import Slot

LEAST = 1 << 15  # weights below which a call of the kernel costs more than it saves


# The first and second halves of one tensor after another, each flat; None where there is no such tensor.
Halves = list[Tensor | None]
Keys = Tensor | None


class CompiledStep:
    """Do with large float32 parameters on the CPU what :func:`functional.inner_move_` does, and leave it the others.

    The first steps compile, with a C++ compiler; one kernel serves every size. Its noise is N(0, 1) and
    a function of (seed, step, weight) as the other's is, but other numbers.
    """

    def __init__(self) -> None:
        move, descend, momentum = (
            torch.compile(kernel, dynamic=True, fullgraph=True) for kernel in (_move, _descend, _descend_with_momentum)
        )
        self._move: Callable[..., None] = move
        self._descend: Callable[..., None] = descend
        self._descend_with_momentum: Callable[..., None] = momentum
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._halves: dict[Tensor, tuple[list[int], Halves | None]] = {}

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
        rest, constants, keys = [], _Constants(), _keys(seeds)
        for i, (y, x) in enumerate(zip(params, anchors, strict=True)):
            k, s = stiffness[i], noise[i]
            halves = self._split(y, x, None if averages is None else averages[i])
            if halves is None or isinstance(k, Tensor) or isinstance(s, Tensor):
                rest.append(i)
                continue
            numbers = constants(k / (1 + k), s, average)
            self._move(*halves, numbers, None if keys is None else keys[i])
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
        constants, keys = _Constants(), _keys(seeds)
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for i, slot in enumerate(slots):
            p, k, s = slot.param, stiffness[i], noise[i]
            if p.numel() < LEAST or isinstance(s, Tensor):
                continue
            group = group_of[p]
            m = optimizer.state.get(p, {}).get("momentum_buffer") if group["momentum"] else None
            if group["maximize"] or group["dampening"] or isinstance(group["lr"], Tensor) or isinstance(k, Tensor):
                continue
            if group["momentum"] and m is None:
                continue
            g = p.grad
            if g is None or g.dtype != p.dtype or g.layout != p.layout or g.stride() != p.stride():
                continue
            tensors = (p, slot.anchor, None if averages is None else averages[i])
            halves = self._split(*tensors) if m is None else self._split(*tensors, m)
            if halves is None:
                continue
            descend = self._descend if m is None else self._descend_with_momentum
            options = (group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"]))
            # The gradient's halves are not kept: it may be another in the next step, and this one's memory free.
            descend(
                *halves,
                *_halves(g),
                constants(k / (1 + k), s, average, *options),
                None if keys is None else keys[i],
            )
            self._withheld.append((p, g))
            p.grad = None

    def forget(self) -> None:
        """Drop what an update that raised has left withheld: by now the gradients are other ones."""
        self._withheld = []

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

    def _split(self, param: Tensor, *others: Tensor | None) -> Halves | None:
        """Halve a parameter and what belongs to it in one common order; None where the kernel is not for it."""
        if param.numel() < LEAST or param.device.type != "cpu":
            return None
        places = [param.data_ptr(), *(0 if t is None else t.data_ptr() for t in others)]
        known = self._halves.get(param)
        if known is None or known[0] != places:
            known = self._halves[param] = (places, _all_halves(param, others))
        return known[1]


def _all_halves(param: Tensor, others: Sequence[Tensor | None]) -> Halves | None:
    halves: Halves = []
    for t in (param, *others):
        if t is None:
            halves += [None, None]
            continue
        if F.flat(t) is None or t.numel() % 2 or t.dtype != torch.float32 or t.stride() != param.stride():
            return None
        halves += _halves(t)
    return halves


def _halves(t: Tensor) -> list[Tensor]:
    flat = F.flat(t)
    assert flat is not None  # its strides are the parameter's, which has a flat view
    # No views, or the compiler makes a kernel for every shape of what is viewed.
    return [half.data for half in flat.chunk(2)]


class _Constants(dict[tuple[Any, ...], Tensor]):
    """Tensors of a few numbers each, made once a step for all parameters that share them."""

    def __call__(self, *numbers: Any) -> Tensor:
        if numbers not in self:
            self[numbers] = torch.tensor(numbers)
        return self[numbers]


def _keys(seeds: Sequence[Sequence[int]] | None) -> list[Tensor] | None:
    """Give the two 32-bit keys of every parameter's noise."""
    if not seeds:
        return None
    pairs = [(_signed(first), _signed(F.seed_of(first, 1))) for first, *_ in seeds]
    # No views, for the same reason.
    return [row.data for row in torch.tensor(pairs, dtype=torch.int32).unbind()]


def _signed(unsigned: int) -> int:
    return (unsigned + 2**31) % 2**32 - 2**31


# One function for each set of tensors that there is: the compiler keeps a limited number of variants of a function, and
# each of these has four, with and without z and noise. ``numbers`` are (pull, noise, average[, lr, weight decay
# [, momentum, Nesterov's or not]]).


def _move(
    y0: Tensor, y1: Tensor, x0: Tensor, x1: Tensor, z0: Tensor | None, z1: Tensor | None, numbers: Tensor, keys: Keys
) -> None:
    """Pull, shake and average."""
    n0, n1 = _noise(y0, keys)
    _write(y0, y0, x0, z0, n0, numbers)
    _write(y1, y1, x1, z1, n1, numbers)


def _descend(
    y0: Tensor,
    y1: Tensor,
    x0: Tensor,
    x1: Tensor,
    z0: Tensor | None,
    z1: Tensor | None,
    g0: Tensor,
    g1: Tensor,
    numbers: Tensor,
    keys: Keys,
) -> None:
    """Take a step of SGD, then pull, shake and average."""
    n0, n1 = _noise(y0, keys)
    _write(y0, y0 - numbers[3] * (g0 + numbers[4] * y0), x0, z0, n0, numbers)
    _write(y1, y1 - numbers[3] * (g1 + numbers[4] * y1), x1, z1, n1, numbers)


def _descend_with_momentum(
    y0: Tensor,
    y1: Tensor,
    x0: Tensor,
    x1: Tensor,
    z0: Tensor | None,
    z1: Tensor | None,
    m0: Tensor,
    m1: Tensor,
    g0: Tensor,
    g1: Tensor,
    numbers: Tensor,
    keys: Keys,
) -> None:
    """Take a step of SGD with momentum, then pull, shake and average."""
    n0, n1 = _noise(y0, keys)
    _write(y0, y0 - numbers[3] * _accumulate(y0, m0, g0, numbers), x0, z0, n0, numbers)
    _write(y1, y1 - numbers[3] * _accumulate(y1, m1, g1, numbers), x1, z1, n1, numbers)


def _accumulate(y: Tensor, m: Tensor, g: Tensor, numbers: Tensor) -> Tensor:
    """Update the momentum and give the direction."""
    g = g + numbers[4] * y
    new = numbers[5] * m + g
    m.copy_(new)
    return torch.where(numbers[6] > 0, g + numbers[5] * new, new)


def _write(y: Tensor, new: Tensor, x: Tensor, z: Tensor | None, n: Tensor | None, numbers: Tensor) -> None:
    """Pull and shake what is to be written into y, and average it into z."""
    new = new + numbers[0] * (x - new)
    if n is not None:
        new = new + numbers[1] * n
    y.copy_(new)
    if z is not None:
        z.copy_(z + numbers[2] * (new - z))


def _noise(y: Tensor, keys: Keys) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keys is None else hashed_normals(y.numel(), keys)


def hashed_normals(n: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Give n pairs of independent numbers N(0, 1), functions of their position and the keys, elementwise.

    Box and Muller's transform of two hashed positions: one is the radius, r = sqrt(-2 log u), the other the angle, as
    an octant's angle of 30 bits, a swap and a sign. Within +-5.9, and exact to float32.

    Args:
        n: how many, < 2^30.
        keys: (2,) int32.

    Returns:
        Two tensors (n,) float32.

    References:
        Box and Muller, A note on the generation of random normal deviates, 1958.
    """
    position = torch.arange(n, dtype=torch.int32, device=keys.device)
    a, b = _hash(position, keys), _hash(position + n, keys)
    radius = torch.sqrt(-2.0 * log(((a >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24 + 2.0**-25))
    cosine, sine = octant((b >> 2).to(torch.float32) * 2.0**-29)
    cosine = torch.where((b & 1) == 0, cosine, -cosine)
    swap = (b & 2) == 0
    return radius * torch.where(swap, cosine, sine), radius * torch.where(swap, sine, cosine)


def _hash(h: Tensor, keys: Tensor) -> Tensor:
    """Hash int32 numbers, with a key in each of the first two rounds.

    References:
        Wellons, hash prospector ("lowbias32").
    """
    h = (h ^ keys[0]) * 0x7FEB352D
    h = ((h ^ ((h >> 16) & 0xFFFF)) + keys[1]) * -0x7B935975  # 0x846CA68B
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x61C8864F  # 0x9E3779B1
    return h ^ ((h >> 16) & 0xFFFF)


# Torch's own log, cos and sin are calls in the middle of the loop and take three times as long. The numbers of the
# polynomials (interpolation at Chebyshev's points) stand in the code: as variables the compiler would fetch them.


def log(u: Tensor) -> Tensor:
    """Approximate the logarithm to 3e-7 of itself.

    Args:
        u: float32, any shape, normal and > 0.

    Returns:
        Same shape.

    Example:
        >>> log(torch.tensor([1.0, 0.5, 20.0855]))
        tensor([ 0.0000, -0.6931,  3.0000])
    """
    # u = 2^e (1 + v) with 1 + v in [sqrt(1/2), sqrt(2)), whose bits begin at 0x3F3504F3.
    bits = u.view(torch.int32) - 0x3F3504F3
    v = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = -0.098953608 * v + 0.16126265
    p = p * v - 0.17278211
    p = p * v + 0.19913346
    p = p * v - 0.24968907
    p = p * v + 0.33334607
    p = p * v - 0.50000376
    p = p * v + 0.99999994
    return (bits >> 23).to(torch.float32) * 0.69314718 + p * v


def octant(v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the cosine and sine of pi/4 v to 2e-7.

    Args:
        v: float32, any shape, in [-1, 1].

    Returns:
        Two tensors of the same shape.

    Example:
        >>> octant(torch.tensor([-1.0, 0.0]))
        (tensor([0.7071, 1.0000]), tensor([-0.7071,  0.0000]))
    """
    a = v * 0.78539816
    q = a * a
    cosine = ((-0.0013585779 * q + 0.041655015) * q - 0.49999856) * q + 1.0
    sine = (((-0.00019503904 * q + 0.008332036) * q - 0.16666651) * q + 1.0) * a
    return cosine, sine
