"""What is sent in 16, 8 or 4 bits: how values are rounded, packed as bytes and read, and what rounding leaves out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS = ("float32", "bfloat16", "int8", "int4")

BLOCK = 1024  # int8 weights that share a scale: 0.4 % on top of the bytes
LEVELS = 127
BLOCK_4 = 128  # int4 weights that share a scale, a divisor of BLOCK: 6 % on top of the bytes, 4.25 bits a weight
LEVELS_4 = 7


def share_size(n: int, ranks: int) -> int:
    """Return how many of n values each of some ranks sums up, whole blocks of them: the last may have none.

    Example:
        >>> share_size(5000, 2)
        3072
    """
    return -(-n // (ranks * BLOCK)) * BLOCK


class Entry(NamedTuple):
    """What a rank's values are to be before they are sent.

    Attributes:
        reference: what all ranks have, so that the difference from it is sent; None: the values are.
        before: what rounding has left out of the values sent before, to be added; None: nothing.
        lost: where nothing is sent, and what was left out before is kept: bool, one for all values or one for each.
    """

    reference: Tensor | None = None
    before: Tensor | None = None
    lost: Tensor | None = None

    def apply_(self, values: Tensor) -> Tensor:
        """Return what is sent, in place of the values."""
        if self.reference is not None:
            values.sub_(self.reference)
        if self.before is not None:
            values.add_(self.before)
        return values if self.lost is None else values.masked_fill_(self.lost, 0.0)


class Codec(Protocol):
    """The arithmetic of a sum whose values are sent with fewer bits. Bytes are rows, of n values each."""

    def enter(self, values: Tensor, entry: Entry, rows: int, n: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of a rank's values, of shape (rows, ...), and what it is to add to the next ones.

        Args:
            values: flat, at most rows x n. They may be overwritten.
            entry: what is done with them first.
            rows: one for each rank.
            n: values in a row, a multiple of :data:`BLOCK`; where there are none, zeros are sent.
        """
        ...

    def pass_on(self, received: Tensor, n: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the bytes of the sum of some rows and a residual, of shape (1, ...), and what they leave out."""
        ...

    def leave(self, received: Tensor, n: int) -> Tensor:
        """Return the values of some rows, flat."""
        ...


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round every block of 1024 values to multiples of 1/127 of its largest magnitude.

    Args:
        values: shape (rows, n), n a multiple of the block.

    Returns:
        Bytes of shape (rows, n + 4 n / block), the int8 values and then the float32 scales; and what rounding has left
        out of the values.

    Example:
        >>> packed, left = to_int8(torch.linspace(-1, 1, 1024).view(1, -1))
        >>> packed.shape, bool(left.abs().max() < 0.5 / 127 + 1e-6)
        (torch.Size([1, 1028]), True)
    """
    packed, scales = _room(values, values.shape[1], BLOCK)
    steps = _steps(values, scales, LEVELS)
    packed[:, : values.shape[1]].view(torch.int8).copy_(steps.view(values.shape))
    return packed, _left(values, steps, scales)


def from_int8(packed: Tensor, n: int) -> Tensor:
    """Return the values, shape (rows, n), that :func:`to_int8` packed."""
    return _scaled(packed[:, :n].view(torch.int8), packed[:, n:])


def to_int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round every block of 128 values to multiples of 1/7 of its largest magnitude, two of them to a byte.

    Args:
        values: shape (rows, n), n a multiple of the block.

    Returns:
        Bytes of shape (rows, n / 2 + 4 n / block), the steps -7 to 7 in pairs and then the float32 scales; and what
        rounding has left out of the values. A block with a value that is not finite stands for none that is.

    Example:
        >>> packed, left = to_int4(torch.linspace(-7, 7, 128).view(1, -1))
        >>> packed.shape, (torch.linspace(-7, 7, 128) - left)[0, ::18].tolist()
        (torch.Size([1, 68]), [-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0])
    """
    half = values.shape[1] // 2
    packed, scales = _room(values, half, BLOCK_4)
    steps = _steps(values, scales, LEVELS_4)
    first, second = steps.view(len(values), half, 2).unbind(-1)
    # Each is sent with 8 on top, the second 16 times.
    packed[:, :half].copy_(torch.add(first, second, alpha=16).add_(17 * (LEVELS_4 + 1)))
    return packed, _left(values, steps, scales)


def from_int4(packed: Tensor, n: int) -> Tensor:
    """Return the values, shape (rows, n), that :func:`to_int4` packed."""
    pairs = packed[:, : n // 2]
    steps = torch.empty(len(packed), n // 2, 2, dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(pairs, 15, out=steps[..., 0])
    torch.bitwise_right_shift(pairs, 4, out=steps[..., 1])
    return _scaled(steps.view(torch.int8).sub_(LEVELS_4 + 1).view(len(packed), n), packed[:, n // 2 :])


def _room(values: Tensor, size: int, block: int) -> tuple[Tensor, Tensor]:
    """Return memory for rows of ``size`` bytes and a float32 scale for every block of values, and the scales in it."""
    blocks = values.shape[1] // block
    packed = torch.empty(len(values), size + 4 * blocks, dtype=torch.uint8, device=values.device)
    return packed, packed[:, size:].view(torch.float32)


def _steps(values: Tensor, scales: Tensor, levels: int) -> Tensor:
    """Compute the scale of every block, in place, and return whole numbers of it, float32: (rows, blocks, block)."""
    blocks = values.to(torch.float32).view(*scales.shape, -1)
    torch.div(torch.linalg.vector_norm(blocks, torch.inf, dim=-1), levels, out=scales)
    # 0 / 0 is of a block of zeros, x / 0 of one whose scale is too small for float32.
    return (blocks / scales.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()


def _left(values: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """Return values less what they are rounded to; the steps are overwritten."""
    return values - steps.mul_(scales.unsqueeze(-1)).view(values.shape)


def _scaled(steps: Tensor, scales: Tensor) -> Tensor:
    """Return steps (rows, n) times the float32 scales, given as bytes, of the blocks they are in."""
    factors = scales.view(torch.float32)
    return (steps.view(*factors.shape, -1) * factors.unsqueeze(-1)).view(steps.shape)


def to_bfloat16(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to bfloat16; return bytes of shape (rows, 2 n), and what rounding has left out of the values."""
    rounded = values.to(torch.bfloat16)
    return rounded.view(torch.uint8), values - rounded


def from_bfloat16(packed: Tensor, n: int) -> Tensor:
    """Return the values, shape (rows, n), that :func:`to_bfloat16` packed, in bfloat16."""
    return packed.view(torch.bfloat16)


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, int], Tensor]
CODECS: dict[str, tuple[Encode, Decode]] = {
    "bfloat16": (to_bfloat16, from_bfloat16),
    "int8": (to_int8, from_int8),
    "int4": (to_int4, from_int4),
}


@dataclass(frozen=True)
class EagerCodec:
    """The :class:`Codec` of a format below float32, call by call: for every device and type of values."""

    format: Format

    def enter(self, values: Tensor, entry: Entry, rows: int, n: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of a rank's values, and what it is to add to the next ones."""
        size = values.numel()
        values = entry.apply_(values)
        padded = torch.nn.functional.pad(values, (0, rows * n - size)) if rows * n > size else values
        given, left = CODECS[self.format][0](padded.view(rows, n))
        left = left.view(-1)[:size]
        if entry.before is not None and entry.lost is not None:
            torch.where(entry.lost, entry.before, left, out=left)
        return given, left

    def pass_on(self, received: Tensor, n: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the bytes of the sum of some rows and a residual, and what they leave out."""
        encode, decode = CODECS[self.format]
        total = decode(received, n).sum(0, keepdim=True, dtype=torch.float32)
        return encode(total if residual is None else total + residual)

    def leave(self, received: Tensor, n: int) -> Tensor:
        """Return the values of some rows, flat."""
        return CODECS[self.format][1](received, n).view(-1)
