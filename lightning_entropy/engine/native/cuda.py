"""The Triton kernel of the inner step, for parameters on a GPU: one launch per device and step.

A launch costs as much as a million weights, so there is one for all parameters. It finds them in a table: per
parameter a row with the addresses of its tensors and its numbers; and per block of 2,048 weights its row, and which
block of the parameter it is. The blocks depend on sizes alone and are laid out once. The rows are sent again only where
a byte of them has changed: with noise, whose keys are new at every step, and where gradients are allocated elsewhere.
They go in one copy from pinned memory, 88 bytes a parameter, that the host does not wait for. Nothing is read back.

It is written by hand because Inductor's kernels of lists of tensors take pointers as arguments, some dozens at a time,
and are compiled for each net's list of sizes. This one is compiled once for a kind of GPU, twice where tensors begin in
the middle of 16 bytes, as gradients in buckets do.
"""

import functools
import struct
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_entropy.engine.native.rows import Numbers, Places

BLOCK = 2048  # weights of one program of the grid; the noise depends on it
# A row of triton_step.py: the addresses of y, x, z, momentum and gradient; the size; the start of the noise; lr, weight
# decay, momentum, Nesterov's or not, pull, noise; two keys.
_ROW = struct.Struct("<5Qqq6f2I")


@functools.cache
def kernel() -> Any:
    """Return the Triton kernel.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        from lightning_entropy.engine.native.triton_step import inner_step
    except ImportError as error:
        raise RuntimeError(f"compile=True needs Triton on CUDA, got: {error}") from error
    return inner_step


class TritonKernel:
    """The :class:`Kernel` of CUDA. Compiling it takes seconds, once a machine: Triton keeps it.

    Args:
        devices: of the parameters.

    Raises:
        RuntimeError: Triton is not installed, or does not work here.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        kernel()
        self._blocks: dict[torch.device, tuple[list[int], Tensor]] = {}  # of which sizes
        self._table: dict[torch.device, tuple[bytes, Tensor]] = {}  # of which bytes
        try:
            for device in set(devices):
                self.run(device, Places([], [], True), [], [], 1.0)
        # Whatever keeps it from working: no C compiler for Triton's launcher, a card that is too old for it.
        except Exception as error:
            raise RuntimeError(f"compile=True needs a Triton that works, on CUDA, got: {error}") from error

    def run(
        self,
        device: torch.device,
        places: Places,
        gradients: Sequence[int],
        numbers: Sequence[Numbers],
        average: float,
    ) -> None:
        """Advance parameters, see :class:`Kernel`. Without any the kernel is compiled."""
        rows = zip(places.addresses, gradients, places.sizes, numbers, strict=True)
        packed = [
            _ROW.pack(*kept, gradient, size, n.noise.start, *n.update, n.pull, n.noise.scale, *n.noise.keys)
            for kept, gradient, size, n in rows
        ]
        with current(device):
            table, blocks = self._table_of(device, packed), self._blocks_of(device, places.sizes)
            kernel()[(len(blocks),)](
                table,
                table.view(torch.float32),
                blocks,
                average,
                BLOCK=BLOCK,
                ALIGNED=places.aligned and all(address % 16 == 0 for address in gradients),
            )

    def _table_of(self, device: torch.device, packed: Sequence[bytes]) -> Tensor:
        """Return the rows on a device, int64; an empty one where there is none."""
        values = b"".join(packed) or bytes(_ROW.size)
        found = self._table.get(device)
        if found is None or found[0] != values:
            found = self._table[device] = values, _sent(torch.frombuffer(bytearray(values), dtype=torch.int64), device)
        return found[1]

    def _blocks_of(self, device: torch.device, sizes: list[int]) -> Tensor:
        """Return (row, block in it) of every block on a device, int32; one block where there is no row."""
        found = self._blocks.get(device)
        if found is None or found[0] != sizes:
            counts = torch.tensor([-(-size // BLOCK) for size in sizes or [1]])
            row = torch.arange(len(counts)).repeat_interleave(counts)
            block = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
            found = self._blocks[device] = sizes, _sent(torch.stack([row, block], 1).to(torch.int32), device)
        return found[1]


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it: torch keeps pinned memory until the copy is done."""
    if device.type == "cpu":  # Triton's interpreter
        return values
    return values.pin_memory().to(device, non_blocking=True)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
