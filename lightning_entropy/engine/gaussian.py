"""Gaussian noise for many parameters at once.

On the CPU every parameter is drawn from streams of its own, one per 2^20 weights, by as many threads as torch uses: the
numbers depend neither on the threads nor on which other parameters move.

Elsewhere a call costs as much as a million numbers. There the parameters lie in chunks, one after another in the
optimizer's order, and a chunk is drawn by one call, with the parameters in it that do not move: their numbers are not
used, so that the others' are the same. A chunk has at most 2^25 numbers, or one parameter, which bounds the memory: 128
MiB for it in float32, as much again for half weights, and three times that for noise in the scale of filters.

A rank that has a part of a parameter draws the whole one's numbers and takes its own, so that they are the same however
many ranks share it, and ranks need not meet. A part that is a run of rows draws no more than the streams it touches, on
the CPU: at most 2^21 numbers too many. Else every rank draws as many as if nothing were sharded, and has that memory
for a moment: of one parameter on the CPU, of a chunk elsewhere.
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_entropy.engine.filters import lengths_of
from lightning_entropy.engine.flat import flat, in_line, is_dense, shaped
from lightning_entropy.engine.shards import Region

BLOCK = 1 << 20  # weights drawn from one stream of random numbers
SLICE = (1 << 15) - 16  # weights updated at once while they are in the cache; torch starts no threads for so few


class Place(NamedTuple):
    """Where the noise of a parameter is: the seed of its chunk, its first number in there, and the chunk's size."""

    seed: int
    start: int
    size: int


class Share(NamedTuple):
    """What of a whole parameter's noise is that of this rank's part."""

    source: Sequence[int] | Place  # of the whole
    region: Region


# The seeds of a parameter's own streams, or its place in a chunk; or these of the parameter that it is a part of.
Source = Sequence[int] | Place | Share


def has_streams(param: Tensor) -> bool:
    """Whether a parameter's noise comes from streams of its own."""
    return param.device.type == "cpu"


def streams(param: Tensor) -> int:
    """Count the streams that a parameter's noise is drawn from, if it has its own: one per 2^20 weights."""
    return max(1, -(-param.numel() // BLOCK))


def numbers(param: Tensor) -> int:
    """Count the numbers that a parameter's noise has: two for a complex weight."""
    return param.numel() * (2 if param.is_complex() else 1)


@torch.no_grad()
def shake_(
    params: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    scales: Sequence[float | Tensor],
    sources: Sequence[Source],
) -> None:
    """Add noise, y <- y + s N(0, I), in place.

    Args:
        params: y, any shapes. Overwritten.
        dtypes: of the arithmetic, one per parameter.
        scales: s, one per parameter: a number, a scalar tensor, or (out, 1, ...), a number per output filter.
        sources: where each parameter's numbers come from.
    """
    own: list[Job] = []
    chunks: dict[tuple[Place, torch.device], list[Row]] = {}
    for y, dtype, s, source in zip(params, dtypes, scales, sources, strict=True):
        if y.numel() == 0:
            continue
        region, origin = (source.region, source.source) if isinstance(source, Share) else (None, source)
        if isinstance(origin, Place):
            chunk = Place(origin.seed, 0, origin.size)
            chunks.setdefault((chunk, y.device), []).append((y, dtype, s, origin.start, region))
        elif region is not None:
            _shake_part_(y, dtype, s, origin, region)
        else:
            blocks = [y] if _varies(s) else _blocks(y)
            own += [(block, dtype, s, seed) for block, seed in zip(blocks, origin, strict=False)]
    if own:
        _shake_by_streams_(own)
    for (chunk, _), rows in chunks.items():
        _shake_chunk_(chunk, sorted(rows, key=lambda row: row[3]))


def _shake_part_(y: Tensor, dtype: torch.dtype, s: float | Tensor, seeds: Sequence[int], region: Region) -> None:
    """Add to a part what a whole parameter's own streams have for it."""
    if _varies(s) or y.is_complex():  # a stream for all of it
        drawn = torch.zeros(region.shape, dtype=dtype)
        _shake_by_streams_([(drawn, dtype, 1.0, seeds[0])])
        add_([y], [drawn[region.slices]], s)
        return
    size, (start, stop) = math.prod(region.shape), region.span
    first, last = start // BLOCK, -(-stop // BLOCK)
    drawn = torch.zeros(min(last * BLOCK, size) - first * BLOCK, dtype=dtype)
    _shake_by_streams_([(b, dtype, 1.0, seed) for b, seed in zip(drawn.split(BLOCK), seeds[first:last], strict=True)])
    whole = stop - start == size
    noise = drawn.view(region.shape)[region.slices] if whole else drawn[start - first * BLOCK : stop - first * BLOCK]
    add_([y], [noise.view(y.shape) if noise.is_contiguous() else noise], s)


# A block of a parameter, the type of the arithmetic, s and the seed of the block's stream.
Job = tuple[Tensor, torch.dtype, float | Tensor, int]


def _varies(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.dim() > 0


def _blocks(y: Tensor) -> Sequence[Tensor]:
    """Cut a parameter into flat blocks of at most 2^20 weights; one block as it is where it cannot be flattened."""
    if y.is_complex() or not is_dense(y):
        return [y]
    whole = flat(y)
    return whole.split(BLOCK) if whole.numel() > BLOCK else [whole]


def _shake_by_streams_(jobs: Sequence[Job]) -> None:
    """Add noise by as many threads as torch uses: torch draws with one, without Python's lock."""
    batches = _batches(jobs)
    threads = torch.get_num_threads()
    if threads == 1 or sum(block.numel() for block, *_ in jobs) < BLOCK:
        _shake_batches_(deque(batches))
        return
    # Largest first, and whoever is free takes the next: shares made beforehand wait for the slowest core.
    queue = deque(sorted(batches, key=lambda batch: -sum(block.numel() for block, *_ in batch)))
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_shake_batches_, queue) for _ in range(threads - 1)]
        _shake_batches_(queue)
        for other in others:
            other.result()


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """Put small blocks of one kind together, which are then added in one call; large ones stay alone."""
    batches: list[list[Job]] = []
    room: dict[object, int] = {}
    open_: dict[object, list[Job]] = {}
    for job in jobs:
        y, dtype, s, _ = job
        kind = (y.dtype, dtype, None if isinstance(s, Tensor) else s)
        if y.numel() > SLICE or y.is_complex() or y.numel() > room.get(kind, -1):
            batches.append([])
            if y.numel() <= SLICE and not y.is_complex():
                open_[kind], room[kind] = batches[-1], SLICE
            else:
                batches[-1].append(job)
                continue
        open_[kind].append(job)
        room[kind] -= y.numel()
    return batches


@torch.no_grad()
def _shake_batches_(queue: deque[list[Job]]) -> None:
    """Add noise to blocks until none is left, in slices that stay in the cache and start no more threads."""
    generator = torch.Generator()
    buffers: dict[torch.dtype, Tensor] = {}
    while queue:
        try:
            batch = queue.popleft()
        except IndexError:  # another thread was faster
            return
        (y, dtype, s, seed), *others = batch
        if y.is_complex() or (y.numel() > SLICE and y.dim() != 1):
            generator.manual_seed(seed)
            noise = torch.empty(numbers(y), dtype=_real(dtype)).normal_(generator=generator)
            add_([y], [torch.view_as_complex(noise.view(*y.shape, 2)) if y.is_complex() else noise.view(y.shape)], s)
            continue
        buffer = buffers.get(dtype)
        if buffer is None:
            buffer = buffers[dtype] = torch.empty(SLICE, dtype=dtype)
        if others:
            parts = buffer[: sum(block.numel() for block, *_ in batch)].split([block.numel() for block, *_ in batch])
            for part, (_, _, _, seed) in zip(parts, batch, strict=True):
                part.normal_(generator=generator.manual_seed(seed))
            noises = [part.view(block.shape) for part, (block, *_) in zip(parts, batch, strict=True)]
            if isinstance(s, Tensor):
                torch._foreach_mul_(noises, [scale.to(dtype) for _, _, scale, _ in batch if isinstance(scale, Tensor)])
            add_([block for block, *_ in batch], noises, 1.0 if isinstance(s, Tensor) else s)
            continue
        generator.manual_seed(seed)
        for part in y.split(SLICE) if y.numel() > SLICE else (y,):
            add_([part], [buffer[: part.numel()].normal_(generator=generator).view(part.shape)], s)


# A parameter of a chunk, the type of the arithmetic, s, the parameter's first number, and what of it the tensor is.
Row = tuple[Tensor, torch.dtype, float | Tensor, int, Region | None]


def _shake_chunk_(chunk: Place, rows: Sequence[Row]) -> None:
    """Draw a chunk by one call, and add to all parameters of one s by another."""
    device, dtype = rows[0][0].device, _real(rows[0][1])
    drawn = torch.empty(chunk.size, dtype=dtype, device=device).normal_(generator=_generator(device, chunk.seed))
    alike: dict[object, list[Row]] = {}
    for row in rows:
        y, _, s, start, region = row
        if region is not None:
            line = drawn[start : start + math.prod(region.shape) * (2 if y.is_complex() else 1)]
            noise = torch.view_as_complex(line.view(*region.shape, 2)) if y.is_complex() else line.view(region.shape)
            add_([y], [noise[region.slices]], s)
            continue
        alike.setdefault("tensors" if isinstance(s, Tensor) else s, []).append(row)
    for some in alike.values():
        s = some[0][2]
        sizes = [numbers(y) for y, *_ in some]
        parts = [drawn.narrow(0, start, size) for size, (*_, start, _) in zip(sizes, some, strict=True)]
        if isinstance(s, Tensor):
            scales, starts = [scale for _, _, scale, *_ in some if isinstance(scale, Tensor)], [row[3] for row in some]
            whole, gaps = drawn[starts[0] : starts[-1] + sizes[-1]], _gaps(starts, sizes)
            if any(gaps) and len(some) < len(rows):  # another's numbers, which must stay as they are
                whole, gaps = torch.cat(parts), [0] * len(sizes)
                parts = list(whole.split(sizes))
            repeats = lengths_of(_filters(scales, sizes, gaps), device)
            whole.mul_(torch.repeat_interleave(in_line(scales).to(dtype), repeats, output_size=whole.numel()))
            s = 1.0
        add_([y for y, *_ in some], [shaped(n, y) for n, (y, *_) in zip(parts, some, strict=True)], s)


def _gaps(starts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Count the numbers of a chunk between one parameter and the next; 0 behind the last."""
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    return [start - end for start, end in zip([*starts[1:], ends[-1]], ends, strict=True)]


def _filters(scales: Sequence[Tensor], sizes: Sequence[int], gaps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the filters of some parameters as (how many, numbers of each); the last one has the gap behind it too."""
    filters: list[tuple[int, int]] = []
    for scale, size, gap in zip(scales, sizes, gaps, strict=True):
        count = scale.numel()
        filters += [(count - 1, size // count), (1, size // count + gap)] if gap else [(count, size // count)]
    return tuple(filters)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def add_(params: Sequence[Tensor], noises: Sequence[Tensor], scale: float | Tensor) -> None:
    """Add noise, y <- y + scale n, in place and in the precision of n.

    Args:
        params: y, all of one type. Overwritten.
        noises: n, of one type and y's shapes. Overwritten where ``scale`` is a tensor.
        scale: a number, or a tensor that broadcasts.

    Example:
        >>> y = torch.tensor([1.0])
        >>> add_([y], [torch.tensor([2.0])], 0.5); y
        tensor([2.])
    """
    ys, ns = list(params), list(noises)
    if isinstance(scale, Tensor):
        if scale.dim():
            ns = [n.mul_(scale.to(n.dtype)) for n in ns]
        else:
            torch._foreach_mul_(ns, scale.to(ns[0].dtype))
        scale = 1.0
    if ys[0].dtype == ns[0].dtype:
        torch._foreach_add_(ys, ns, alpha=scale)
        return
    wide = [torch.empty_like(n) for n in ns]
    torch._foreach_copy_(wide, ys)
    torch._foreach_add_(wide, ns, alpha=scale)
    torch._foreach_copy_(ys, wide)
