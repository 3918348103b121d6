"""The C++ kernel of the inner step, for parameters on the CPU.

It is C++ because it takes all parameters in one call. A kernel of ``torch.compile`` is called once for each, at 25 to
50 us: for the 161 of a ResNet-50 that is more than it saves, and one graph of them all would be compiled for every net.
"""

import struct
from collections.abc import Iterable, Sequence

import torch

from lightning_entropy.engine.native.build import kernel
from lightning_entropy.engine.native.rows import Numbers, Places

# step.cpp's Parameter: the addresses of y, x, z, momentum and gradient, 0 where there is none; the size; lr,
# weight decay, momentum, Nesterov's or not, pull, noise; two keys.
_PARAMETER = struct.Struct("@5Qq6f2I")


class CppKernel:
    """The :class:`Kernel` of the CPU. Building it takes a second or two, with a C++ compiler.

    Raises:
        RuntimeError: it cannot be built.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kernel()  # and not kept: a loop may be copied and pickled

    def run(
        self,
        device: torch.device,
        places: Places,
        gradients: Sequence[int],
        numbers: Sequence[Numbers],
        average: float,
    ) -> None:
        """Advance parameters, see :class:`Kernel`."""
        rows = zip(places.addresses, gradients, places.sizes, numbers, strict=True)
        packed = [
            _PARAMETER.pack(*kept, gradient, size, *n.update, n.pull, n.noise.scale, *n.noise.keys)
            for kept, gradient, size, n in rows
        ]
        kernel().inner_step(b"".join(packed), len(packed), average, torch.get_num_threads())
