"""Rounding what is sent on a GPU by one kernel where torch takes up to thirteen calls, for ``compile=True``.

They are three: what a rank sends first, what it sends of the sum, and what is read of that. Each reads and writes a
number once. They are compiled when the first rounded exchange begins, in seconds, once a machine: Triton keeps them.

Inductor would take the eager code as it is, but its kernels are compiled for each net's size, and a scale among bytes,
a view of another type, is a call of its own to it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_entropy.engine.native.cuda import current
from lightning_entropy.strategies.compression import BLOCK, BLOCK_4, LEVELS, LEVELS_4, Entry, Format


class Layout(NamedTuple):
    """How a format lies in memory.

    Attributes:
        bits: of a value.
        group: values that share a scale.
        levels: steps on either side of zero; 0: there are no scales.
        word: type of what values are written as.
    """

    bits: int
    group: int
    levels: int
    word: torch.dtype

    def row(self, n: int) -> int:
        """Return the bytes of n values and their scales."""
        return n * self.bits // 8 + (4 * n // self.group if self.levels else 0)


LAYOUTS: Mapping[Format, Layout] = {
    "bfloat16": Layout(16, BLOCK, 0, torch.int16),
    "int8": Layout(8, BLOCK, LEVELS, torch.int8),
    "int4": Layout(4, BLOCK_4, LEVELS_4, torch.uint8),
}


def is_fusible(values: Tensor) -> bool:
    """Whether the kernels are for these values."""
    return values.is_cuda and values.dtype == torch.float32


@functools.cache
def kernels() -> Any:
    """Return the module of the kernels. It needs Triton, which ``compile=True`` has asked for at the start."""
    from lightning_entropy.strategies import triton_rounding

    return triton_rounding


@dataclass(frozen=True)
class FusedCodec:
    """The :class:`Codec` of a format below float32 for values that :func:`is_fusible`: the bytes of the others."""

    format: Format

    def enter(self, values: Tensor, entry: Entry, rows: int, n: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of a rank's values, and what it is to add to the next ones."""
        given, left = self._room(values, rows, n), torch.empty_like(values)
        lost = None if entry.lost is None else entry.lost.view(torch.uint8)
        kernel, size = kernels().enter, values.numel()
        self._launch(kernel, rows, n, values, entry.reference, entry.before, lost, *self._parts(given), left, size)
        return given, left

    def pass_on(self, received: Tensor, n: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the bytes of the sum of some rows and a residual, and what they leave out."""
        given, left = self._room(received, 1, n), torch.empty(1, n, device=received.device)
        parts = *self._parts(received), residual, *self._parts(given), left
        self._launch(kernels().pass_on, 1, n, *parts, ROWS=len(received))
        return given, left

    def leave(self, received: Tensor, n: int) -> Tensor:
        """Return the values of some rows, flat."""
        values = torch.empty(len(received) * n, device=received.device)
        self._launch(kernels().leave, len(received), n, *self._parts(received), values)
        return values

    def _room(self, like: Tensor, rows: int, n: int) -> Tensor:
        """Return memory for the bytes of some rows."""
        return torch.empty(rows, LAYOUTS[self.format].row(n), dtype=torch.uint8, device=like.device)

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return bytes as values and as scales: which of them are what the kernel knows."""
        return packed.view(LAYOUTS[self.format].word), packed.view(torch.float32 if self._scaled else torch.uint8)

    @property
    def _scaled(self) -> bool:
        return LAYOUTS[self.format].levels > 0

    def _launch(self, kernel: Any, rows: int, n: int, *given: Any, **constants: int) -> None:
        """Launch a kernel, a program for every block of every row."""
        layout, device = LAYOUTS[self.format], given[0].device
        with current(device):
            kernel[(rows * n // BLOCK,)](
                *given,
                n,
                **constants,
                BLOCK=BLOCK,
                BITS=layout.bits,
                GROUP=layout.group,
                LEVELS=layout.levels,
                enable_fp_fusion=False,  # or what is left out is not that of what is sent, to the last bit
            )
