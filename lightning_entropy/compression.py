"""How a flat tensor is summed over replicas: whole, in bfloat16, or in int8 with a scale per block."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Format = Literal["float32", "bfloat16", "int8"]
FORMATS = ("float32", "bfloat16", "int8")

BLOCK = 1024  # weights that share a scale: 0.4 % on top of the bytes
LEVELS = 127


class Sum:
    """One sum over a process group, under way.

    Args:
        values: what this rank adds, flat. Kept until :meth:`result`.
        group: over which.
        format: ``"float32"``: as they are. ``"bfloat16"``: rounded to it, and summed in it. ``"int8"``: every rank
            sums its share of the int8 values in float32, and hands the sum round in int8.
        residual: int8's rounding errors of this rank's share of the last sum, added to this one; None: none.

    Attributes:
        sent: what of ``values`` the others receive.
        payload: bytes of ``values`` in this format.
        residual: to be given to the next sum; None but for int8.
    """

    def __init__(self, values: Tensor, group: dist.ProcessGroup, format: Format, residual: Tensor | None) -> None:
        self._group, self._size = group, dist.get_world_size(group)
        self._like = values
        self.residual = residual
        self._works: list[Any] = []
        self._second: Tensor | None = None
        if format == "int8":
            count = values.numel()
            share = -(-count // (self._size * BLOCK)) * BLOCK
            padded = torch.nn.functional.pad(values, (0, share * self._size - count)).view(self._size, share)
            packed, sent = quantize(padded)
            self.sent = sent.view(-1)[:count]
            self._buffer = torch.empty_like(packed)
            self.payload = packed.numel()
            self._given = packed
            self._works.append(dist.all_to_all_single(self._buffer, packed, group=group, async_op=True))
            self._share: int | None = share
            return
        self._share = None
        self._buffer = values.to(torch.bfloat16) if format == "bfloat16" else values.clone()
        self.sent = self._buffer.to(values.dtype, copy=True) if format == "bfloat16" else values
        self.payload = self._buffer.numel() * self._buffer.element_size()
        self._works.append(dist.all_reduce(self._buffer, group=group, async_op=True))

    @property
    def in_halves(self) -> bool:
        """Whether a second half follows the first."""
        return self._share is not None

    @property
    def done(self) -> bool:
        """Whether :meth:`result` would return at once."""
        self.progress()
        return (self._share is None or self._second is not None) and all(work.is_completed() for work in self._works)

    def progress(self) -> None:
        """Start int8's second half if the first has arrived."""
        if self._share is not None and self._second is None and self._works[-1].is_completed():
            self._start_second()

    def result(self) -> Tensor:
        """Wait for the sum.

        Raises:
            RuntimeError: a rank of the group is gone.
        """
        if self._share is not None and self._second is None:
            self._start_second()
        for work in self._works:
            work.wait()
        if self._share is None:
            return self._buffer.to(self._like.dtype)
        assert self._second is not None
        return dequantize(self._second, self._share).view(-1)[: self._like.numel()].to(self._like.dtype)

    def _start_second(self) -> None:
        assert self._share is not None
        self._works.pop().wait()
        total = dequantize(self._buffer, self._share).sum(0, keepdim=True)
        if self.residual is not None:
            total = total + self.residual
        packed, sent = quantize(total)
        self.residual = total - sent
        self._given = packed
        self._second = torch.empty(self._size, packed.shape[1], dtype=torch.uint8, device=packed.device)
        pieces = [piece.view(1, -1) for piece in self._second.unbind()]
        self._works.append(dist.all_gather(pieces, packed, group=self._group, async_op=True))


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round every block of 1024 to 127 steps of its largest magnitude, to either side.

    Args:
        values: shape (rows, n), n a multiple of the block.

    Returns:
        Bytes of shape (rows, n + 4 n / block): the int8 values and then the float32 scales; and the values they stand
        for.

    Example:
        >>> packed, values = quantize(torch.linspace(-1, 1, 1024).view(1, -1))
        >>> packed.shape, bool((values - torch.linspace(-1, 1, 1024)).abs().max() < 0.5 / 127 + 1e-6)
        (torch.Size([1, 1028]), True)
    """
    blocks = values.to(torch.float32).reshape(values.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / LEVELS
    steps = torch.where(scales > 0, blocks / scales, 0.0).round_().to(torch.int8)
    packed = torch.cat([steps.view(values.shape[0], -1).view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], 1)
    return packed, (steps * scales).view(values.shape).to(values.dtype)


def dequantize(packed: Tensor, n: int) -> Tensor:
    """Give the values, shape (rows, n), that :func:`quantize` packed."""
    steps = packed[:, :n].contiguous().view(torch.int8).view(packed.shape[0], -1, BLOCK)
    scales = packed[:, n:].contiguous().view(torch.float32)
    return (steps * scales.unsqueeze(-1)).view(packed.shape[0], n)
