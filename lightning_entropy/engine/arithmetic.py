"""The arithmetic of one inner and one outer step, in place on lists of tensors. Nothing here remembers anything."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 20  # weights drawn from one stream of random numbers
_SLICE = (1 << 15) - 16  # weights updated at once while they are in the cache; torch starts no threads for so few


def pull_(params: Sequence[Tensor], anchors: Sequence[Tensor], stiffness: Sequence[float | Tensor]) -> None:
    r"""Pull y toward x by the implicit spring step y <- (y + k x) / (1 + k), in place.

    The proximal map of  k/2 |y - x|^2  with k = lr * gamma: stable for every k >= 0, and the
    decoupled form of the force gamma (y - x) in Algorithm 1, line 4.

    Args:
        params: y, any shapes. Overwritten.
        anchors: x, same shapes as ``params``; the arithmetic is done in their type.
        stiffness: k = lr * gamma, one per parameter, dimensionless, >= 0. Zero leaves y as it is.

    Raises:
        ValueError: if the lists differ in length.

    Example:
        >>> y = [torch.tensor([3.0])]
        >>> pull_(y, [torch.tensor([1.0])], [1.0]); y
        [tensor([2.])]

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, arXiv:1611.01838.
    """
    for y, x, k in zip(params, anchors, stiffness, strict=True):
        if isinstance(k, float) and k == 0:
            continue
        _write_(y, x, k / (1 + k))


def attract_(params: Sequence[Tensor], anchors: Sequence[Tensor], stiffness: Sequence[float | Tensor]) -> None:
    r"""Take the explicit spring step y <- y - k (y - x), in place: stable for 0 <= k < 2.

    Args, errors: as :func:`pull_`.

    Raises:
        ValueError: if the lists differ in length.

    Example:
        >>> y = [torch.tensor([3.0])]
        >>> attract_(y, [torch.tensor([1.0])], [0.5]); y
        [tensor([2.])]
    """
    for y, x, k in zip(params, anchors, stiffness, strict=True):
        _write_(y, x, k)


def average_(averages: Sequence[Tensor], params: Sequence[Tensor], weight: float) -> None:
    r"""Update the running mean z <- z + weight (y - z), in place.

    Args:
        averages: z, any shapes. Overwritten.
        params: y, same shapes.
        weight: of the newest y, in (0, 1].

    Raises:
        ValueError: if the lists differ in length.

    Example:
        >>> z = [torch.tensor([1.0])]
        >>> average_(z, [torch.tensor([3.0])], 0.75); z
        [tensor([2.5000])]
    """
    for z, y in zip(averages, params, strict=True):
        z.lerp_(y.to(z.dtype), weight)


def _write_(y: Tensor, x: Tensor, weight: float | Tensor) -> None:
    """Move y the fraction ``weight`` of the way to x, in x's precision."""
    if isinstance(weight, Tensor):
        weight = weight.to(x.dtype)
    if y.dtype == x.dtype:
        y.lerp_(x, weight)
    else:
        y.copy_(y.to(x.dtype).lerp_(x, weight))


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


def streams(param: Tensor) -> int:
    """Count the random streams that :func:`inner_move_` draws a parameter's noise from: one per 2^20 weights."""
    return max(1, -(-param.numel() // BLOCK))


@dataclass
class Move:
    """What follows the optimizer's update in one inner step: per parameter one entry of every list.

    Attributes:
        params: y.
        anchors: x, same shapes; the arithmetic is done in their type.
        averages: z, same shapes; None: no running mean.
        stiffness: k = lr * gamma >= 0.
        noise: s = sqrt(lr) * noise >= 0, a number or a tensor that broadcasts.
        average: weight of the newest y in z, in (0, 1].
        seeds: :func:`streams` (param) seeds per parameter; None: no noise.
    """

    params: Sequence[Tensor]
    anchors: Sequence[Tensor]
    averages: Sequence[Tensor] | None
    stiffness: Sequence[float | Tensor]
    noise: Sequence[float | Tensor]
    average: float = 1.0
    seeds: Sequence[Sequence[int]] | None = None

    def part(self, indices: Sequence[int]) -> "Move":
        """Return the move of some of the parameters."""
        return Move(
            params=[self.params[i] for i in indices],
            anchors=[self.anchors[i] for i in indices],
            averages=None if self.averages is None else [self.averages[i] for i in indices],
            stiffness=[self.stiffness[i] for i in indices],
            noise=[self.noise[i] for i in indices],
            average=self.average,
            seeds=None if self.seeds is None else [self.seeds[i] for i in indices],
        )


def inner_move_(move: Move) -> None:
    r"""Pull, shake and average: what follows the optimizer's update in every inner step, in place.

    y <- (y + k x) / (1 + k);  y <- y + s N(0, I);  z <- z + average (y - z).
    On the CPU large tensors go one by one, while y is in the cache, and the noise is drawn by as many threads as torch
    uses. The result does not depend on their number.

    Args:
        move: ``params`` and ``averages`` are overwritten.

    Raises:
        ValueError: if the lists differ in length.
    """
    params, average = move.params, move.average
    means: Sequence[Tensor | None] = move.averages or [None] * len(params)
    rows = list(zip(params, move.anchors, means, move.stiffness, move.noise, strict=True))
    if move.seeds is not None:
        _pull_rows_(rows)
        _shake_rows_(rows, move.seeds)
        _average_rows_(rows, average)
        return
    # Tensor by tensor, while y is in the cache; list by list where calls cost more than memory, small or on a GPU.
    large = [i for i, y in enumerate(params) if y.numel() > _SLICE and y.device.type == "cpu"]
    for i in large:
        y, x, z, k, _ = rows[i]
        pull_([y], [x], [k])
        if z is not None:
            average_([z], [y], average)
    others = [rows[i] for i in sorted(set(range(len(rows))) - set(large))]
    _pull_rows_(others)
    _average_rows_(others, average)


# A parameter's y, x, z, k and s.
Row = tuple[Tensor, Tensor, Tensor | None, float | Tensor, float | Tensor]


def _pull_rows_(rows: Sequence[Row]) -> None:
    """Pull in few calls: one per distinct k where types agree."""
    alike: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for y, x, _, k, _ in rows:
        if isinstance(k, Tensor) or y.dtype != x.dtype:
            pull_([y], [x], [k])
        elif k != 0:
            alike.setdefault(k, []).append((y, x))
    for k, pairs in alike.items():
        torch._foreach_lerp_([y for y, _ in pairs], [x for _, x in pairs], k / (1 + k))


def _average_rows_(rows: Sequence[Row], average: float) -> None:
    """Average in one call."""
    means = [(z, y if y.dtype == z.dtype else y.to(z.dtype)) for y, _, z, _, _ in rows if z is not None]
    if means:
        torch._foreach_lerp_([z for z, _ in means], [y for _, y in means], average)


def _shake_rows_(rows: Sequence[Row], seeds: Sequence[Sequence[int]]) -> None:
    """Add noise, on the CPU by as many threads as torch uses: torch draws with one, without Python's lock."""
    jobs = [
        (block, x.dtype, s, seed)
        for (y, x, _, _, s), param_seeds in zip(rows, seeds, strict=True)
        for block, seed in zip([y] if _varies(s) else _blocks(y), param_seeds, strict=False)
    ]
    threads = torch.get_num_threads()
    if sum(block.numel() for block, *_ in jobs) < BLOCK or jobs[0][0].device.type != "cpu":
        threads = 1
    if threads == 1:
        _shake_blocks_(deque(jobs))
        return
    # Largest first, and whoever is free takes the next: shares made beforehand wait for the slowest core.
    queue = deque(sorted(jobs, key=lambda job: -job[0].numel()))
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_shake_blocks_, queue) for _ in range(threads - 1)]
        _shake_blocks_(queue)
        for other in others:
            other.result()


# A block of a parameter, the type of the arithmetic, s and the seed of the block's stream.
Job = tuple[Tensor, torch.dtype, float | Tensor, int]


def _varies(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.dim() > 0


def _blocks(y: Tensor) -> Sequence[Tensor]:
    """Cut a parameter into flat blocks of at most 2^20 weights; one block as it is where it cannot be flattened."""
    whole = None if y.is_complex() else flat(y)
    return [y] if whole is None else whole.split(BLOCK)


def flat(t: Tensor) -> Tensor | None:
    """View a dense tensor as one dimension in the order of its memory; None where no such view is known."""
    if t.is_contiguous():
        return t.view(-1)
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if t.dim() == dims and t.is_contiguous(memory_format=memory_format):
            return t.movedim(1, -1).view(-1)
    return None


@torch.no_grad()
def _shake_blocks_(queue: deque[Job]) -> None:
    """Add noise to blocks until none is left: on the CPU in slices that stay in the cache and start no more threads."""
    generator: torch.Generator | None = None
    buffers: dict[torch.dtype, Tensor] = {}
    while queue:
        try:
            y, dtype, s, seed = queue.popleft()
        except IndexError:  # another thread was faster
            return
        if generator is None or generator.device != y.device:
            generator = torch.Generator(device=y.device)
        generator.manual_seed(seed)
        if y.dim() != 1 or y.device.type != "cpu" or y.is_complex():
            shake_(y, _normal(y, dtype, generator), s)
            continue
        buffer = buffers.get(dtype)
        if buffer is None:
            buffer = buffers[dtype] = torch.empty(_SLICE, dtype=dtype)
        for part in y.split(_SLICE) if y.numel() > _SLICE else (y,):
            shake_(part, buffer[: part.numel()].normal_(generator=generator), s)


def _normal(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw N(0, 1) numbers of the tensor's shape and device; a complex one has both parts N(0, 1)."""
    if like.is_complex():
        real = torch.empty((*like.shape, 2), dtype=torch.view_as_real(like).dtype, device=like.device)
        return torch.view_as_complex(real.normal_(generator=generator))
    return torch.empty(like.shape, dtype=dtype, device=like.device).normal_(generator=generator)


def shake_(y: Tensor, n: Tensor, scale: float | Tensor) -> None:
    """Add noise, y <- y + scale * n, in place and in the precision of n.

    Args:
        y: overwritten.
        n: N(0, 1) numbers, same shape. Overwritten where ``scale`` is a tensor.
        scale: a number, or a tensor that broadcasts.

    Example:
        >>> y = torch.tensor([1.0])
        >>> shake_(y, torch.tensor([2.0]), 0.5); y
        tensor([2.])
    """
    if isinstance(scale, Tensor):
        n, scale = n.mul_(scale.to(n.dtype)), 1.0
    if y.dtype == n.dtype:
        y.add_(n, alpha=scale)
    else:
        y.copy_(y.to(n.dtype).add_(n, alpha=scale))


def filter_norms(param: Tensor) -> Tensor:
    """Compute the norm of each output filter, ready to broadcast.

    Args:
        param: (out, ...) with two dimensions or more; a vector or scalar counts as one filter.

    Returns:
        (out, 1, ...), or a scalar for a vector.

    Example:
        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])

    References:
        Bisla, Wang and Choromanska, Low-pass filtering SGD, AISTATS 2022, arXiv:2201.08025.
    """
    if param.dim() < 2:
        return torch.linalg.vector_norm(param)
    return torch.linalg.vector_norm(param, dim=tuple(range(1, param.dim())), keepdim=True)


def filter_rms(param: Tensor) -> Tensor:
    """Compute the root mean square of each output filter, ready to broadcast.

    Noise of this standard deviation has, on average over its draws, the square norm of the filter.

    Args:
        param: (out, ...) with two dimensions or more, a filter not empty.

    Returns:
        (out, 1, ...).

    Example:
        >>> filter_rms(torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 4.0, 0.0]]))
        tensor([[3.],
                [2.]])
    """
    return filter_norms(param) / param[0].numel() ** 0.5


def rms_distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the root mean square per weight of left - right, in the unit of a weight.

    Args:
        left: tensors of any shape.
        right: same shapes.

    Returns:
        A scalar on the tensors' device; no device is waited for.

    Example:
        >>> rms_distance([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])])
        tensor(1.)
    """
    differences = [a.to(b.dtype) - b for a, b in zip(left, right, strict=True)]
    return norm(differences) / sum(d.numel() for d in differences) ** 0.5


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all tensors together.

    Args:
        tensors: one or more, of any shape.

    Returns:
        A scalar on the first tensor's device; no device is waited for.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = [torch.linalg.vector_norm(t) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
