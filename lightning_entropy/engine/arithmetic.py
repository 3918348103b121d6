"""The arithmetic of one inner and one outer step, in place on lists of tensors. Nothing here remembers anything."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_entropy.engine.flat import CHUNK, flat, runs, shaped
from lightning_entropy.engine.gaussian import SLICE, Source, shake_
from lightning_entropy.engine.shards import is_sharded, joined_norms


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
    for ys, xs, k in _alike(params, anchors, stiffness):
        _approach_(ys, xs, k / (1 + k))


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
    for ys, xs, k in _alike(params, anchors, stiffness):
        _approach_(ys, xs, k)


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
    same = [(z, y) for z, y in zip(averages, params, strict=True) if z.dtype == y.dtype]
    if same:
        torch._foreach_lerp_([z for z, _ in same], [y for _, y in same], weight)
    narrow = [(z, y) for z, y in zip(averages, params, strict=True) if z.dtype != y.dtype]
    for run in runs([z.numel() for z, _ in narrow], CHUNK):
        zs = [narrow[i][0] for i in run]
        torch._foreach_lerp_(zs, copies([narrow[i][1] for i in run], like=zs), weight)


def _alike(
    params: Sequence[Tensor], anchors: Sequence[Tensor], stiffness: Sequence[float | Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor], float | Tensor]]:
    """Yield y and x of one stiffness that is not zero, and either all of one type or none: one call does for them."""
    alike: dict[object, tuple[float | Tensor, list[tuple[Tensor, Tensor]]]] = {}
    for y, x, k in zip(params, anchors, stiffness, strict=True):
        if isinstance(k, Tensor) or k != 0:
            key = (id(k) if isinstance(k, Tensor) else k, y.dtype == x.dtype)
            alike.setdefault(key, (k, []))[1].append((y, x))
    for k, pairs in alike.values():
        yield [y for y, _ in pairs], [x for _, x in pairs], k


def _approach_(params: Sequence[Tensor], anchors: Sequence[Tensor], weight: float | Tensor) -> None:
    """Move y the fraction ``weight`` of the way to x, in x's precision."""
    if params[0].dtype == anchors[0].dtype:
        _lerp_(params, anchors, weight)
        return
    for run in runs([y.numel() for y in params], CHUNK):
        ys, xs = [params[i] for i in run], [anchors[i] for i in run]
        wide = copies(ys, like=xs)
        _lerp_(wide, xs, weight)
        torch._foreach_copy_(ys, wide)


def _lerp_(ys: Sequence[Tensor], xs: Sequence[Tensor], weight: float | Tensor) -> None:
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(list(ys), list(xs), weight)
        return
    steps = torch._foreach_sub(list(xs), list(ys))
    torch._foreach_mul_(steps, weight.to(steps[0].dtype))
    torch._foreach_add_(list(ys), steps)


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
        seeds: where each parameter's noise comes from, a :data:`Source`; None: no noise.
    """

    params: Sequence[Tensor]
    anchors: Sequence[Tensor]
    averages: Sequence[Tensor] | None
    stiffness: Sequence[float | Tensor]
    noise: Sequence[float | Tensor]
    average: float = 1.0
    seeds: Sequence[Source] | None = None

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
    Calls are few, as they cost more than memory where tensors are small or on a GPU; but on the CPU large tensors go
    one by one, while y is in the cache.

    Args:
        move: ``params`` and ``averages`` are overwritten.

    Raises:
        ValueError: if the lists differ in length.
    """
    params, anchors, means = move.params, move.anchors, move.averages
    list(zip(params, anchors, params if means is None else means, move.stiffness, move.noise, strict=True))
    if move.seeds is not None:
        pull_(params, anchors, move.stiffness)
        shake_(params, [x.dtype for x in anchors], move.noise, move.seeds)
        if means is not None:
            average_(means, params, move.average)
        return
    large = [i for i, y in enumerate(params) if y.numel() > SLICE and y.device.type == "cpu"]
    others = sorted(set(range(len(params))) - set(large))
    for run in [*([i] for i in large), *([others] if others else [])]:
        part = move.part(run)
        pull_(part.params, part.anchors, part.stiffness)
        if part.averages is not None:
            average_(part.averages, part.params, move.average)


def copies(tensors: Sequence[Tensor], *, like: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return copies of tensors in one call, in their own type and memory layout or those of others."""
    new = [torch.empty_like(t, requires_grad=False) for t in (tensors if like is None else like)]
    copy_(new, tensors)
    return new


def copy_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors in one call; into those on another device one by one, and without waiting."""
    pairs = list(zip(tensors, values, strict=True))
    here = [(t, value) for t, value in pairs if t.device == value.device]
    if here:
        torch._foreach_copy_([t for t, _ in here], [value for _, value in here])
    for t, value in pairs if len(here) < len(pairs) else []:
        if t.device != value.device:
            t.copy_(value, non_blocking=True)


def copy_where_written_(anchors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Copy into x the numbers of y that are not x's, rounded; a y that is not written has less than x's precision.

    Args:
        anchors: x. Overwritten.
        params: y, of less precision.
    """
    groups: dict[object, list[int]] = {}
    for i, (x, y) in enumerate(zip(anchors, params, strict=True)):
        groups.setdefault((x.device, x.dtype, y.dtype), []).append(i)
    for indices in groups.values():
        for run in runs([anchors[i].numel() for i in indices], CHUNK):
            xs, ys = [anchors[indices[j]] for j in run], [params[indices[j]] for j in run]
            # In the order of memory, or in that of indices where a model has changed its memory format since.
            alike = [x.stride() == y.stride() for x, y in zip(xs, ys, strict=True)]
            x = torch.cat([flat(x) if a else x.reshape(-1) for x, a in zip(xs, alike, strict=True)])
            y = torch.cat([flat(y) if a else y.reshape(-1) for y, a in zip(ys, alike, strict=True)])
            lines = torch.where(x.to(y.dtype) == y, x, y).split([x.numel() for x in xs])
            rows = zip(lines, xs, alike, strict=True)
            copy_(xs, [shaped(line, x) if a else line.view(x.shape) for line, x, a in rows])


def rms_distance(left: Sequence[Tensor], right: Sequence[Tensor], of: Sequence[Tensor] = ()) -> Tensor:
    """Compute the root mean square per weight of left - right, in the unit of a weight.

    Args:
        left: tensors of any shape.
        right: same shapes.
        of: the parameters that they are this rank's parts of; none: they are whole.

    Returns:
        A scalar on the tensors' device; no device is waited for.

    Example:
        >>> rms_distance([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])])
        tensor(1.)
    """
    differences = torch._foreach_sub([a.to(b.dtype) for a, b in zip(left, right, strict=True)], list(right))
    return norm(differences, of) / sum(d.numel() for d in of or differences) ** 0.5


def norm(tensors: Sequence[Tensor], of: Sequence[Tensor] = ()) -> Tensor:
    """Compute the Euclidean norm of all tensors together.

    Args:
        tensors: one or more, of any shape.
        of: the parameters that they are this rank's parts of; none: they are whole. A collective where there are parts.

    Returns:
        A scalar on the first tensor's device; no device is waited for.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = list(torch._foreach_norm(list(tensors)))
    if is_sharded(of):
        norms = joined_norms(norms, of)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def differ(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[bool]:
    """Compare tensors with values of the same shape, in the tensors' precision; waits for the device once.

    Args:
        pairs: tensors, each with a value, which may be on another device and wider.

    Returns:
        Of each pair whether any element differs.

    Example:
        >>> differ([(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])), (torch.tensor([1.0]), torch.tensor([0.0]))])
        [False, True]
    """
    flags = [(tensor != value.to(tensor.device, tensor.dtype, non_blocking=True)).any() for tensor, value in pairs]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
