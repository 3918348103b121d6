"""How a flat tensor is summed over replicas: as it is, or rounded to 16, 8 or 4 bits with the rounding error kept."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS = ("float32", "bfloat16", "int8", "int4")

BLOCK = 1024  # int8 weights that share a scale: 0.4 % on top of the bytes
LEVELS = 127
BLOCK_4 = 128  # int4 weights that share a scale, a divisor of BLOCK: 6 % on top of the bytes, 4.25 bits a weight
LEVELS_4 = 7


class Collectives(Protocol):
    """What a sum asks of a group of processes. Each returns the work in progress, as torch.distributed does."""

    @property
    def size(self) -> int:
        """How many processes."""
        ...

    def all_reduce(self, values: Tensor) -> Any:
        """Sum in place."""
        ...

    def all_to_all(self, received: Tensor, given: Tensor) -> Any:
        """Exchange rows: of ``given`` one for each process, of ``received`` one from each."""
        ...

    def all_gather(self, received: list[Tensor], given: Tensor) -> Any:
        """Receive what every process gives."""
        ...


class GroupCollectives:
    """:class:`Collectives` of a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """How many processes."""
        return dist.get_world_size(self._group)

    def all_reduce(self, values: Tensor) -> Any:
        """Sum in place."""
        return dist.all_reduce(values, group=self._group, async_op=True)

    def all_to_all(self, received: Tensor, given: Tensor) -> Any:
        """Exchange rows."""
        return dist.all_to_all_single(received, given, group=self._group, async_op=True)

    def all_gather(self, received: list[Tensor], given: Tensor) -> Any:
        """Receive what every process gives."""
        return dist.all_gather(received, given, group=self._group, async_op=True)


def share_size(n: int, ranks: int) -> int:
    """Return how many of n values each of some ranks sums up, whole blocks of them: the last may have none.

    Example:
        >>> share_size(5000, 2)
        3072
    """
    return -(-n // (ranks * BLOCK)) * BLOCK


class Sum:
    """One sum over a group of processes, in progress.

    ``"float32"`` sends the values as they are, in one all-reduce. The others send bytes in two halves: every rank
    receives the others' values of its share and sums them in float32, and then sends the rounded sum to all.

    Args:
        values: what this rank adds, flat. In ``"float32"`` they become the sum.
        group: over which.
        format: of what is sent.
        residual: the rounding error of this rank's share of the last sum, added to this one; None: nothing.

    Attributes:
        left: ``values`` less what the others receive of them; None where they receive all.
        payload: bytes of ``values`` in this format.
        residual: for the next sum.
    """

    def __init__(self, values: Tensor, group: Collectives, format: Format, residual: Tensor | None) -> None:
        self._group, self._size, self._dtype = group, values.numel(), values.dtype
        self.residual = residual
        self.left: Tensor | None = None
        self._codec = CODECS.get(format)
        self._second: Tensor | None = None
        if self._codec is None:
            self._given = values
            self._work = group.all_reduce(self._given)
        else:
            self._share = share_size(self._size, group.size)
            room = self._share * group.size - self._size
            padded = torch.nn.functional.pad(values, (0, room)) if room else values
            self._given, left = self._codec[0](padded.view(group.size, -1))
            self.left = left.view(-1)[: self._size]
            self._first = torch.empty_like(self._given)
            self._work = group.all_to_all(self._first, self._given)
        self.payload = self._given.numel() * self._given.element_size()

    @property
    def in_halves(self) -> bool:
        """Whether a second half follows the first."""
        return self._codec is not None

    @property
    def done(self) -> bool:
        """Whether :meth:`result` would return at once, without a collective."""
        return (not self.in_halves or self._second is not None) and self._work.is_completed()

    def progress(self) -> None:
        """Start the second half if the first has arrived."""
        if self.in_halves and self._second is None and self._work.is_completed():
            self._start_second()

    def advance(self) -> None:
        """Wait for the first half, if there are two, and start the second."""
        if self.in_halves and self._second is None:
            self._start_second()

    def result(self) -> Tensor:
        """Wait for the sum and return it.

        Raises:
            RuntimeError: a rank of the group is gone.
        """
        self.advance()
        self._work.wait()
        if self._codec is None:
            return self._given
        assert self._second is not None
        return self._codec[1](self._second, self._share).view(-1)[: self._size].to(self._dtype)

    def _start_second(self) -> None:
        assert self._codec is not None
        encode, decode = self._codec
        self._work.wait()
        total = decode(self._first, self._share).sum(0, keepdim=True, dtype=torch.float32)
        if self.residual is not None:
            total = total + self.residual
        self._given, self.residual = encode(total)
        self._second = torch.empty_like(self._first)
        pieces = [piece.view(1, -1) for piece in self._second.unbind()]
        self._work = self._group.all_gather(pieces, self._given)


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
