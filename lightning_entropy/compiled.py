r"""An inner step in one pass over memory, for ``compile=True``.

What an inner step does to a weight is a dozen operations on five numbers, and costs what it takes to fetch them. The
kernel in ``inner_step.cpp`` does all of it while they are in registers: the pull, the noise and the running mean and,
where the user's optimizer is plain ``torch.optim.SGD``, its update too. Then the gradient is withheld from the
optimizer for this step, so that nothing is updated twice, and given back. The noise is a hashed counter made Gaussian
two numbers at a time, so that no pass is spent on drawing it.

It is C++ because it takes all parameters in one call. A kernel of ``torch.compile`` is called once for each, at 25 to
50 us: for the 161 of a ResNet-50 that is more than it saves, and one graph of them all would be compiled for every net.
"""

import ctypes
import functools
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_entropy import functional as F
from lightning_entropy.slots import Slot

# inner_step.cpp's Parameter: the addresses of y, x, z, momentum and gradient, 0 where there is none; the size; lr,
# weight decay, momentum, Nesterov's or not, pull, noise; two keys.
_PARAMETER = struct.Struct("@5Qq6f2I")

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_LIMIT = 1 << 32  # weights: the kernel counts them in 32 bits


class CompiledStep:
    """Do with float32 parameters on the CPU what :func:`functional.inner_move_` does, and leave it the others.

    The first step builds the kernel: a second or two, with a C++ compiler. Its noise is N(0, 1) and a function of
    (seed, step, weight) as the other's is, but other numbers.
    """

    def __init__(self) -> None:
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._alike: dict[Tensor, tuple[list[int], bool]] = {}

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
        rows: list[tuple[Any, ...]] = []
        done, rest = [], []
        for i, (y, x) in enumerate(zip(params, anchors, strict=True)):
            z, k, s = None if averages is None else averages[i], stiffness[i], noise[i]
            if isinstance(k, Tensor) or isinstance(s, Tensor) or not self._takes(y, x, z):
                rest.append(i)
                continue
            addresses = (y.data_ptr(), x.data_ptr(), 0 if z is None else z.data_ptr(), 0, 0)
            rows.append((*addresses, y.numel(), 0.0, 0.0, 0.0, 0.0, k / (1 + k), *_noise(s, seeds, i)))
            done.append(y)
        _run(rows, done, average)
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
        rows: list[tuple[Any, ...]] = []
        options = {p: _sgd_options(group) for group in optimizer.param_groups for p in group["params"]}
        for i, slot in enumerate(slots):
            p, k, s, numbers = slot.param, stiffness[i], noise[i], options[slot.param]
            if numbers is None or isinstance(k, Tensor) or isinstance(s, Tensor):
                continue
            x, z, g = slot.anchor, None if averages is None else averages[i], p.grad
            m = optimizer.state.get(p, {}).get("momentum_buffer") if numbers[2] else None
            if numbers[2] and m is None:
                continue
            if g is None or g.dtype != p.dtype or not _same_order(p, g) or not self._takes(p, x, z, m):
                continue
            addresses = (p.data_ptr(), x.data_ptr(), *(0 if t is None else t.data_ptr() for t in (z, m)), g.data_ptr())
            rows.append((*addresses, p.numel(), *numbers, k / (1 + k), *_noise(s, seeds, i)))
            self._withheld.append((p, g))
        _run(rows, [p for p, _ in self._withheld], average)
        for p, _ in self._withheld:
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

    def _takes(self, param: Tensor, *others: Tensor | None) -> bool:
        """Tell whether the kernel is for a parameter: what belongs to it is float32 and in its order in memory."""
        places = [param.data_ptr(), *(0 if t is None else t.data_ptr() for t in others)]
        known = self._alike.get(param)
        if known is None or known[0] != places:
            right = param.device.type == "cpu" and param.dtype == torch.float32 and param.numel() < _LIMIT
            alike = right and all(t is None or (t.dtype == param.dtype and _same_order(param, t)) for t in others)
            known = self._alike[param] = (places, alike)
        return known[1]


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape are dense and lie in memory in the same order."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return False
    formats = _FORMATS if a.dim() in (4, 5) else _FORMATS[:1]
    return any(a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f) for f in formats)


def _sgd_options(group: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """Give (lr, weight decay, momentum, Nesterov's or not) of a group of SGD; None where the kernel cannot."""
    if group["maximize"] or group["dampening"] or group["differentiable"] or isinstance(group["lr"], Tensor):
        return None
    return group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"])


def _noise(scale: float, seeds: Sequence[Sequence[int]] | None, i: int) -> tuple[float, int, int]:
    """Give the size of a parameter's noise and its two keys."""
    if seeds is None:
        return 0.0, 0, 0
    first = seeds[i][0]
    return scale, first, F.seed_of(first, 1)


def _run(rows: Sequence[tuple[Any, ...]], changed: Iterable[Tensor], average: float) -> None:
    if rows:
        table = b"".join(_PARAMETER.pack(*row) for row in rows)
        kernel().inner_step(table, len(rows), average, torch.get_num_threads())
        torch.autograd.graph.increment_version(changed)


@functools.cache
def kernel() -> ctypes.CDLL:
    """Build ``inner_step.cpp`` for this processor and load it, once a process.

    The compiler is ``$CXX``, or else c++, g++ or clang++. Nothing is kept on disk.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise RuntimeError(f"compile=True needs a C++ compiler, got none: {' or '.join(names)} is not to be found")
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # whose threads are torch's own
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "inner_step.so"
        command = [*compiler, *flags, "-o", str(built), str(Path(__file__).with_name("inner_step.cpp"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compile=True needs a C++ compiler that works, got from {compiler[0]}: {done.stderr}")
        library = ctypes.CDLL(str(built))
    library.inner_step.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int]
    library.inner_step.restype = None
    return library
