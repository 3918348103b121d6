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
from lightning_entropy.engine.native.rows import Kernel, MakeKernel, Numbers, Tables, Tensors, Update, noise_of
from lightning_entropy.engine.optimizer_hooks import has_foreign_hooks
from lightning_entropy.engine.weight import Weight

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
        self._withheld: list[tuple[Tensor, Tensor | None]] = []
        devices = {p.device for p in params}
        self._kernels: dict[str, Kernel] = {}
        for kind in sorted({device.type for device in devices} & set(KERNELS)):
            self._kernels[kind] = KERNELS[kind]([device for device in devices if device.type == kind])
        self._tables = Tables(self._kernels)
        others = ", ".join(sorted({device.type for device in devices} - set(KERNELS)))
        if others:
            warnings.warn(
                f"compile=True does nothing for parameters on {others}: its kernels are CUDA's and the CPU's",
                stacklevel=2,
            )

    def move_(self, move: Move) -> None:
        """Pull, shake and average, in place; as :func:`arithmetic.inner_move_`."""
        chosen, tensors, numbers = list[int](), list[Tensors](), list[Numbers]()
        for i, (y, x) in enumerate(zip(move.params, move.anchors, strict=True)):
            own = _numbers(move, i, Update())
            if own is not None:
                chosen.append(i)
                tensors.append(Tensors(y, x, None if move.averages is None else move.averages[i]))
                numbers.append(own)
        taken = {chosen[j] for j in self._tables.run(tensors, numbers, move.average)}
        F.inner_move_(move.part([i for i in range(len(move.params)) if i not in taken]))

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
        options: dict[Tensor, Update | None] = {}
        for group in optimizer.param_groups:
            options |= dict.fromkeys(group["params"], _sgd_options(group))
        chosen, tensors, numbers = list[Tensor](), list[Tensors](), list[Numbers]()
        for i, w in enumerate(weights):
            p, update = w.param, options[w.param]
            own = None if update is None else _numbers(move, i, update)
            if p.grad is None or update is None or own is None:
                continue
            if w.value is not p:  # a shard, whose gradient and momentum are shards as well
                continue
            m = optimizer.state.get(p, {}).get("momentum_buffer") if update.momentum else None
            if update.momentum and m is None:
                continue
            chosen.append(p)
            tensors.append(Tensors(p, w.anchor, None if move.averages is None else move.averages[i], m, p.grad))
            numbers.append(own)
        for j in self._tables.run(tensors, numbers, move.average):
            self._withheld.append((chosen[j], chosen[j].grad))
            chosen[j].grad = None

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


def _numbers(move: Move, i: int, update: Update) -> Numbers | None:
    """Return what a step does to the i-th parameter; None where no kernel does it."""
    k, s = move.stiffness[i], move.noise[i]
    if isinstance(k, Tensor) or isinstance(s, Tensor):
        return None
    noise = noise_of(s, move.seeds, i)
    return None if noise is None else Numbers(update, k / (1 + k), noise)
