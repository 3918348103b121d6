r"""An inner step in one pass over memory, for ``compile=True``.

What an inner step does to a weight is a dozen operations on five numbers, and costs what it takes to fetch them. The
kernel in ``step.cpp`` does all of it while they are in registers: the pull, the noise and the running mean and,
where the user's optimizer is plain ``torch.optim.SGD``, its update too. Then the gradient is withheld from the
optimizer for this step, so that nothing is updated twice, and given back. The noise is a hashed counter made Gaussian
two numbers at a time, so that no pass is spent on drawing it.

It is C++ because it takes all parameters in one call. A kernel of ``torch.compile`` is called once for each, at 25 to
50 us: for the 161 of a ResNet-50 that is more than it saves, and one graph of them all would be compiled for every net.
"""

import struct
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.arithmetic import Move
from lightning_entropy.engine.gaussian import Share, Source
from lightning_entropy.engine.native.build import kernel
from lightning_entropy.engine.noise import seed_of
from lightning_entropy.engine.optimizer_hooks import has_foreign_hooks
from lightning_entropy.engine.weights import Weight

# step.cpp's Parameter: the addresses of y, x, z, momentum and gradient, 0 where there is none; the size; lr,
# weight decay, momentum, Nesterov's or not, pull, noise; two keys.
_PARAMETER = struct.Struct("@5Qq6f2I")
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_TYPES = (Tensor, torch.nn.Parameter)  # a subclass may keep its numbers elsewhere
_NO_UPDATE = (0.0, 0.0, 0.0, 0.0)
_LIMIT = 1 << 32  # weights: the kernel counts them in 32 bits


class NativeStep:
    """A native :func:`arithmetic.inner_move_` for float32 parameters on the CPU; all others fall back to it.

    Its noise is N(0, 1) and a function of (seed, step, weight) as the other's is, but other numbers.

    Args:
        params: that may come. If any is on the CPU, the kernel is built now: a second or two, with a C++ compiler.

    Raises:
        RuntimeError: the kernel cannot be built.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._withheld: list[tuple[Tensor, Tensor]] = []
        devices = {p.device.type for p in params}
        if "cpu" in devices:
            kernel()
        elif devices:
            warnings.warn(
                f"compile=True does nothing for parameters on {', '.join(sorted(devices))}: its kernel is the CPU's",
                stacklevel=2,
            )

    def move_(self, move: Move) -> None:
        """Pull, shake and average, in place; as :func:`arithmetic.inner_move_`."""
        rows = _Rows()
        left = []
        for i, (y, x) in enumerate(zip(move.params, move.anchors, strict=True)):
            z, k, s = None if move.averages is None else move.averages[i], move.stiffness[i], move.noise[i]
            taken = False
            if not isinstance(k, Tensor) and not isinstance(s, Tensor) and not _is_share(move.seeds, i):
                taken = rows.take((y, x, z, None, None), *_NO_UPDATE, k / (1 + k), *_noise(s, move.seeds, i))
            if not taken:
                left.append(i)
        rows.run(move.average)
        F.inner_move_(move.part(left))

    def sgd_(self, optimizer: Optimizer, weights: Sequence[Weight], move: Move) -> None:
        """Take the whole inner step where the optimizer is plain SGD; until :meth:`release` it has no gradient there.

        The first step of a parameter, which makes its momentum, is the optimizer's own; so are all where other step
        hooks are to see the gradient.

        Args:
            optimizer: the user's.
            weights: of the parameters that have a gradient.
            move: what follows their update.
        """
        if type(optimizer) is not SGD or getattr(optimizer, "grad_scale", None) is not None:
            return
        if has_foreign_hooks(optimizer):
            return
        rows = _Rows()
        options = {p: _sgd_options(group) for group in optimizer.param_groups for p in group["params"]}
        for i, w in enumerate(weights):
            p, k, s, numbers = w.param, move.stiffness[i], move.noise[i], options[w.param]
            if p.grad is None or numbers is None or isinstance(k, Tensor) or isinstance(s, Tensor):
                continue
            if w.value is not p:  # a shard, whose gradient and momentum are shards as well
                continue
            m = optimizer.state.get(p, {}).get("momentum_buffer") if numbers[2] else None
            if numbers[2] and m is None:
                continue
            tensors = (p, w.anchor, None if move.averages is None else move.averages[i], m, p.grad)
            if rows.take(tensors, *numbers, k / (1 + k), *_noise(s, move.seeds, i)):
                self._withheld.append((p, p.grad))
        rows.run(move.average)
        for p, _ in self._withheld:
            p.grad = None

    def forget(self) -> None:
        """Discard gradients withheld by a step that raised; they are stale."""
        self._withheld = []

    def release(self) -> set[Tensor]:
        """Put the withheld gradients back.

        Returns:
            The parameters whose inner step is taken.
        """
        taken = set()
        for p, gradient in self._withheld:
            p.grad = gradient
            taken.add(p)
        self._withheld = []
        return taken


class _Rows:
    """The rows of one call of the kernel, one per parameter."""

    def __init__(self) -> None:
        self._rows: dict[int, bytes] = {}  # by the parameter's address: two at the same one cannot go side by side
        self._params: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor | None], *numbers: float) -> bool:
        """Queue a parameter if all its tensors are float32 and share its memory layout.

        Args:
            tensors: y, x, z, momentum and gradient; None where there is none.
            numbers: the others of ``_PARAMETER``.

        Returns:
            Whether it was added.
        """
        y = tensors[0]
        assert y is not None
        if not _plain(y) or y.numel() >= _LIMIT or not _same_order(y, y):
            return False
        size, stride = y.numel(), y.stride()
        for t in tensors[1:]:
            if t is None:
                continue
            if not _plain(t) or t.numel() != size or (t.stride() != stride and not _same_order(y, t)):
                return False
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if addresses[0] in self._rows:
            return False
        self._rows[addresses[0]] = _PARAMETER.pack(*addresses, size, *numbers)
        self._params.append(y)
        return True

    def run(self, average: float) -> None:
        """Call the kernel."""
        if self._params:
            kernel().inner_step(b"".join(self._rows.values()), len(self._rows), average, torch.get_num_threads())
            torch.autograd.graph.increment_version(self._params)


def _plain(t: Tensor) -> bool:
    """Whether a tensor's numbers are float32 and lie in this process's memory as they are."""
    if type(t) not in _TYPES or t.layout is not torch.strided or not t.is_cpu or t.dtype is not torch.float32:
        return False
    return not t.is_neg() and (t.data_ptr() != 0 or t.numel() == 0)


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, are dense and lie in memory in the same order."""
    formats = _FORMATS if a.dim() in (4, 5) else _FORMATS[:1]
    alike = (a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f) for f in formats)
    return a.shape == b.shape and any(alike)


def _sgd_options(group: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """Return (lr, weight decay, momentum, Nesterov's or not) of a group of SGD; None where the kernel cannot."""
    if group["maximize"] or group["dampening"] or group["differentiable"] or isinstance(group["lr"], Tensor):
        return None
    return group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"])


def _is_share(seeds: Sequence[Source] | None, i: int) -> bool:
    """Whether a parameter's noise is part of another's: the kernel counts from a parameter's first weight."""
    return seeds is not None and isinstance(seeds[i], Share)


def _noise(scale: float, seeds: Sequence[Source] | None, i: int) -> tuple[float, int, int]:
    """Return the size of a parameter's noise and its two keys."""
    if seeds is None:
        return 0.0, 0, 0
    source = seeds[i]
    assert not isinstance(source, Share)
    first = source[0]
    return scale, first, seed_of(first, 1)
