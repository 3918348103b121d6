"""Normal numbers on the CPU at half the price of torch's generator, of which drawing its bits is the larger part."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@functools.cache
def table() -> Tensor:
    """Give the means of the 2^16 equally likely slices of N(0, 1), scaled to variance 1/4, float32."""
    edges = torch.special.ndtri(torch.arange(1, 1 << 16, dtype=torch.float64, device="cpu") / (1 << 16))
    density = torch.nn.functional.pad(torch.exp(-edges.square() / 2), (1, 1))
    means = density[:-1] - density[1:]
    return (means / means.square().mean().sqrt() / 2).float()


class Normals:
    r"""Numbers N(0, 1), float32, four at a time from four draws of a table: a + b + c + d and with signs.

    The table has 2^16 equally likely values, so 16 random bits make a number. What is discrete and short in its law is
    gone in the law of a sum of four: its characteristic function is the normal one to 2e-6, its kurtosis 3 - 4e-5, its
    tail right to 4 % at 5 standard deviations, and it ends at 8.7. The four sums, whose signs are orthogonal, are
    uncorrelated, and their squares to 1e-4.

    Args:
        most: numbers of the largest draw.

    Example:
        >>> normals = Normals(100)
        >>> normals.seed(0)
        >>> first = normals.draw(100).clone()
        >>> normals.seed(0)
        >>> torch.equal(normals.draw(100), first)
        True
    """

    def __init__(self, most: int) -> None:
        size = 4 * math.ceil(most / 4)
        self._index = np.empty(size, np.int32)
        self._drawn, self._sums = torch.empty(2, size, dtype=torch.float32, device="cpu")

    def seed(self, seed: int) -> None:
        """Start the stream of this seed, an int >= 0."""
        self._bits = np.random.Generator(np.random.SFC64(seed))

    def draw(self, n: int) -> Tensor:
        """Give the next n numbers (n,), on loan until the next draw."""
        words = math.ceil(n / 4)
        bits = self._bits.integers(0, 2**64 - 1, size=words, dtype=np.uint64, endpoint=True).view(np.uint16)
        # In place: arrays of this size come from the system anew each time, a page fault for every 4 KiB.
        index, drawn, sums = self._index[: 4 * words], self._drawn[: 4 * words], self._sums[: 4 * words]
        np.copyto(index, bits)
        torch.index_select(table(), 0, torch.from_numpy(index), out=drawn)
        _butterfly(drawn.chunk(2), sums.chunk(2))
        for before, after in zip(sums.chunk(2), drawn.chunk(2), strict=True):
            _butterfly(before.chunk(2), after.chunk(2))
        return drawn[:n]


def _butterfly(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Write the sum and the difference of two tensors into two others."""
    torch.add(*before, out=after[0])
    torch.sub(*before, out=after[1])
