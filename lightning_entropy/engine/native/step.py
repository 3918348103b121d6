r"""An inner step in one pass over memory, for ``compile=True``.

What an inner step does to a weight is a dozen operations on five numbers, and costs what it takes to fetch them. A
kernel, in C++ for the CPU and in Triton for CUDA, does all of it while they are in registers: the pull, the noise and
the running mean and, where the user's optimizer is plain ``torch.optim.SGD``, its update too. Then the gradient is
withheld from the optimizer for this step, so that nothing is updated twice, and given back. The noise is a counter,
scrambled and made Gaussian two numbers at a time, so that no pass is spent on drawing it.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.arithmetic import Move
from lightning_entropy.engine.native.cpu import CppKernel
from lightning_entropy.engine.native.cuda import TritonKernel
from lightning_entropy.engine.native.rows import Kernel, MakeKernel, Rows, Update, noise_of
from lightning_entropy.engine.optimizer_hooks import has_foreign_hooks
from lightning_entropy.engine.weights import Weight

KERNELS: Mapping[str, MakeKernel] = {"cpu": CppKernel, "cuda": TritonKernel}  # by kind of device


class NativeStep:
    """A native :func:`arithmetic.inner_move_` for float32 parameters on the CPU and CUDA; all others fall back to it.

    Its noise is N(0, 1) and a function of (seed, step, weight) as the other's is, but other numbers.

    Args:
        params: that may come. The kernels for the devices they are on are built now, in seconds.

    Raises:
        RuntimeError: a kernel cannot be built.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._withheld: list[tuple[Tensor, Tensor]] = []
        devices = {p.device for p in params}
        self._kernels: dict[str, Kernel] = {}
        for kind in sorted({device.type for device in devices} & set(KERNELS)):
            self._kernels[kind] = KERNELS[kind]([device for device in devices if device.type == kind])
        others = ", ".join(sorted({device.type for device in devices} - set(KERNELS)))
        if others:
            warnings.warn(
                f"compile=True does nothing for parameters on {others}: its kernels are CUDA's and the CPU's",
                stacklevel=2,
            )

    def move_(self, move: Move) -> None:
        """Pull, shake and average, in place; as :func:`arithmetic.inner_move_`."""
        rows = Rows(self._kernels)
        left = []
        for i, (y, x) in enumerate(zip(move.params, move.anchors, strict=True)):
            z, k, s = None if move.averages is None else move.averages[i], move.stiffness[i], move.noise[i]
            taken = False
            if not isinstance(k, Tensor) and not isinstance(s, Tensor):
                taken = rows.take((y, x, z, None, None), Update(), k / (1 + k), noise_of(s, move.seeds, i))
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
        rows = Rows(self._kernels)
        options = {p: _sgd_options(group) for group in optimizer.param_groups for p in group["params"]}
        for i, w in enumerate(weights):
            p, k, s, numbers = w.param, move.stiffness[i], move.noise[i], options[w.param]
            if p.grad is None or numbers is None or isinstance(k, Tensor) or isinstance(s, Tensor):
                continue
            if w.value is not p:  # a shard, whose gradient and momentum are shards as well
                continue
            m = optimizer.state.get(p, {}).get("momentum_buffer") if numbers.momentum else None
            if numbers.momentum and m is None:
                continue
            tensors = (p, w.anchor, None if move.averages is None else move.averages[i], m, p.grad)
            if rows.take(tensors, numbers, k / (1 + k), noise_of(s, move.seeds, i)):
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


def _sgd_options(group: dict[str, Any]) -> Update | None:
    """Return the numbers of a group of SGD; None where no kernel does its step."""
    if group["maximize"] or group["dampening"] or group["differentiable"] or isinstance(group["lr"], Tensor):
        return None
    return Update(group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"]))
