"""Which random numbers a loop draws: a function of the seed, the step and the parameter, with nothing to remember."""

import hashlib
from collections.abc import Sequence

from torch import Tensor

from lightning_entropy.engine import arithmetic as F


class NoiseStreams:
    """The seeds of an optimizer's noise. The global random state is neither read nor changed.

    Streams are counted: step after step, parameter after parameter, one per 2^20 weights. So no two of them are the
    same until 2^32 are drawn, and a step needs no state but its number.

    Args:
        seed: any int; another one starts the count elsewhere.
        purpose: so does another purpose.
    """

    def __init__(self, seed: int, purpose: str = "") -> None:
        self.seed = seed
        start = hashlib.blake2b(f"{seed}{purpose}".encode(), digest_size=4).digest()
        self._start = int.from_bytes(start, "little")
        self._first: dict[Tensor, int] = {}
        self._per_step = 0

    def seeds(self, params: Sequence[Tensor], every: Sequence[Tensor], step: int) -> list[list[int]]:
        """Return the seeds of one step, a list per parameter.

        Args:
            params: that move in this step.
            every: all parameters of the optimizer, in its order.
            step: number of the step, >= 0.

        Returns:
            For each of ``params``, as many seeds as it has streams.
        """
        if len(self._first) != len(every) or not all(p in self._first for p in every):
            self._first, self._per_step = {}, 0
            for p in every:
                self._first[p] = self._per_step
                self._per_step += F.streams(p)
        first = self._start + step * self._per_step
        return [[F.seed_of(first, self._first[p] + i) for i in range(F.streams(p))] for p in params]
