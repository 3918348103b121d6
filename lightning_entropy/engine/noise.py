"""Which random numbers a loop draws: a function of the seed, the step and the parameter, with nothing to remember."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_entropy.engine.flat import CHUNK, runs
from lightning_entropy.engine.gaussian import Place, Share, Source, has_streams, numbers, streams
from lightning_entropy.engine.shards import region_of


class NoiseStreams:
    """The seeds of an optimizer's noise. The global random state is neither read nor changed.

    Streams are counted: step after step, parameter after parameter, one per 2^20 weights. So no two of them are the
    same until 2^32 are drawn, and a step needs no state but its number. A chunk of parameters on a GPU is drawn from
    the first stream of its first parameter.

    Args:
        seed: any int; another one starts the count elsewhere.
        purpose: so does another purpose.
    """

    def __init__(self, seed: int, purpose: str = "") -> None:
        self.seed = seed
        start = hashlib.blake2b(f"{seed}{purpose}".encode(), digest_size=4).digest()
        self._start = int.from_bytes(start, "little")
        self._devices: list[torch.device] = []
        self._first: dict[Tensor, int] = {}
        self._chunks: dict[Tensor, tuple[int, int, int]] = {}  # the chunk's stream, the first number in it, its size
        self._per_step = 0

    def seeds(self, params: Sequence[Tensor], every: Sequence[Tensor], step: int) -> list[Source]:
        """Return where the noise of one step comes from.

        Args:
            params: that move in this step.
            every: all parameters of the optimizer, in its order.
            step: number of the step, >= 0.

        Returns:
            For each of ``params``, as many seeds as it has streams, or its place in a chunk; of a parameter that is
            sharded, those of the whole one and what of it is this rank's.
        """
        devices = [p.device for p in every]
        if devices != self._devices or not all(p in self._first for p in every):
            self._devices = devices
            self._lay_out(every)
        first = self._start + step * self._per_step
        sources = [self._source(p, first) for p in params]
        regions = [region_of(p) for p in params]
        return [s if region is None else Share(s, region) for s, region in zip(sources, regions, strict=True)]

    def _source(self, p: Tensor, first: int) -> Sequence[int] | Place:
        if p in self._chunks:
            stream, start, size = self._chunks[p]
            return Place(seed_of(first, stream), start, size)
        return [seed_of(first, self._first[p] + i) for i in range(streams(p))]

    def _lay_out(self, every: Sequence[Tensor]) -> None:
        """Count the streams of all parameters, and put those that have none of their own into chunks."""
        self._first, self._chunks, self._per_step = {}, {}, 0
        together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in every:
            self._first[p] = self._per_step
            self._per_step += streams(p)
            if not has_streams(p):
                together.setdefault((p.device, torch.promote_types(p.dtype, torch.float32)), []).append(p)
        for some in together.values():
            sizes = [numbers(p) for p in some]
            for run in runs(sizes, CHUNK):
                size, start = sum(sizes[i] for i in run), 0
                for i in run:
                    self._chunks[some[i]] = (self._first[some[run[0]]], start, size)
                    start += sizes[i]


def seed_of(base: int, counter: int) -> int:
    """Map a stream's number to the seed of its generator: a bijection of the integers modulo 2^32.

    The CPU generator of torch uses 32 bits of its seed, so streams are counted, which keeps 2^32 of them apart,
    and the count is then scrambled, because neighbouring seeds of a Mersenne twister start alike.

    Args:
        base: where this optimizer's streams start, any int.
        counter: number of the stream, >= 0.

    Returns:
        An int in [0, 2^32).
    """
    h = (base + counter) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons, "lowbias32"
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
