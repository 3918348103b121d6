"""How loud and how round is the noise of SGD: the diffusion matrix of per-example gradients."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.estimate import Estimate
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples, checked_examples
from lightning_entropy.diagnostics.gradient_noise.example_gradients import CentredGradients
from lightning_entropy.diagnostics.gradient_noise.result import GradientNoiseResult
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched


def gradient_noise(
    module: nn.Module,
    data: Iterable[Batch],
    *,
    loss: Loss | None = None,
    examples: Examples = None,
    batch_dim: BatchDim = None,
    lr: float | None = None,
    batch_size: int | None = None,
    chunk: int | None = None,
    memory: float = 2.0,
    vectorize: bool = True,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
    groups: int = 0,
) -> GradientNoiseResult:
    r"""Measure D = (1/N) sum_k (g_k - g)(g_k - g)^T from per-example gradients g_k, in eval mode.

    D is P x P, but its non-zero eigenvalues are those of the N x N Gram matrix of the centred gradients over N:
    networks of millions of weights need only N P numbers at a time, or, where ``memory`` holds fewer rows, a
    number of passes that grows as N over the rows held. With fewer weights than examples D itself is summed.

    Chaudhari & Soatto 2018 (arXiv:1710.11029), Definition 1, equation (2) and figures 1 and 2. The noise scale is
    that of McCandlish et al. 2018 (arXiv:1812.06162), B = tr(D) / |g|^2: batches much smaller than B waste steps,
    much larger ones waste examples. Its |g|^2 is freed of the noise's own contribution tr(D) / N, since examples
    stand for the population that they were drawn from; near a minimum that leaves little, and the error bar (delta
    method) says so.

    Args:
        module: The network, at the weights to measure.
        data: A loader or an iterable of batches.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        examples: How many examples of ``data``, N >= 2; or a callable from a batch to its number of them, and all are
            taken. None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that they share.
        lr: Learning rate, for the temperature.
        batch_size: b, for the temperature.
        chunk: Per-example gradients computed at once, >= 1. None: as many as an eighth of ``memory`` holds, at most 64.
            Where there is no memory for the graphs of so many, half as many are side by side, with a warning.
        memory: GiB for gradients. The weights' copies, about four vectors of P, and activations come on top.
        vectorize: Compute a chunk by ``vmap``. False: one example at a time, for modules that cannot be vectorized. So
            are batches of one example, and those with a list of one number or string for each.
        seed: Of the choice of examples.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.
        groups: Of examples, for the error that the choice of examples makes: 0, or >= 2. Leaving each out in turn (the
            jackknife) takes as many eigenvalue problems again. A sum of outer products is kept for each where there
            are fewer weights than examples: none of it where ``memory`` does not hold them.

    Returns:
        The spectrum; see :class:`GradientNoiseResult`.

    Raises:
        ValueError: If an argument is out of range, the data holds fewer than two examples, ``memory`` does not hold
            ``chunk`` gradients, a gradient is not finite, or the loss is not a mean over examples.

    Example:
        >>> net, data = nn.Linear(1, 1, bias=False), [torch.tensor([[1.0], [3.0]])]
        >>> result = gradient_noise(net, data, loss=lambda m, x: m(x).mean())     # f_k = w x_k, so g_k = x_k = 1, 3
        >>> result.eigenvalues.round(5).tolist(), result.gradient_squared    # variance 1, mean 2
        ([1.0], 4.0)
    """
    checked_examples(examples, 2)
    if groups < 0 or groups == 1:
        raise ValueError(f"groups must be 0 or at least 2, got {groups}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be None or at least 1, got {chunk}")
    with untouched(module, "eval", seed):
        surface = LossSurface(
            module, data, loss=loss, examples=examples, batch_dim=batch_dim, seed=seed, state=state, transfer=transfer
        )
        n, size = surface.examples, len(surface)
        if n < 2:
            raise ValueError("data must hold at least 2 examples, got 1")

        gib = size * surface.weights.element_size() / 2**30
        rows = int(memory / gib) - 2  # Beside the weights and the mean gradient.
        chunk = chunk or max(1, min(64, rows // 8))
        # A chunk of gradients, twice over while it is put together, and at least one chunk of rows to meet it.
        if rows < 4 * chunk:
            raise ValueError(
                f"memory must be at least {(4 * chunk + 2) * gib:.3g} GiB for a chunk of {chunk} gradients of {size:,} "
                f"weights, got {memory}"
            )
        side = min(size, n)
        if side * side * 8 / 2**30 > memory:
            raise ValueError(
                f"memory must be at least {side * side * 8 / 2**30:.3g} GiB for a matrix of {side:,} by {side:,}, got "
                f"{memory}: or take fewer examples"
            )
        stream = CentredGradients(surface, chunk, vectorize)
        held = max(chunk, (rows - 3 * chunk) // chunk * chunk)
        count = min(groups, n // 2)
        if size <= n:
            count = count if (count + 2) * side * side * 8 / 2**30 <= memory else 0
            matrix, others = _dense(stream, _borders(n, count), progress)
        else:
            matrix = _gram(stream, held, progress)
            others = list(_without(matrix, _borders(n, count)))

        def result(spectrum: Tensor, examples: int, scale: Estimate, rest: tuple[GradientNoiseResult, ...] = ()) -> Any:
            return GradientNoiseResult(
                weights=size,
                examples=examples,
                loss=surface.value,
                eigenvalues=np.maximum(torch.linalg.eigvalsh(spectrum).cpu().numpy()[::-1].copy(), 0.0),
                gradient_squared=float(stream.mean @ stream.mean),
                noise_scale=scale,
                lr=lr,
                batch_size=batch_size,
                left_out=rest,
            )

        rest = tuple(result(other, kept, Estimate(math.nan)) for other, kept in others)
        return result(matrix / n, n, stream.noise_scale(), rest)


def _borders(examples: int, count: int) -> list[tuple[int, int]]:
    """Return where groups of equal size begin and end; none for fewer than two."""
    ends = [round(examples * g / count) for g in range(count + 1)] if count > 1 else [0]
    return list(pairwise(ends))


def _dense(
    stream: CentredGradients, borders: list[tuple[int, int]], progress: bool
) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """Sum the P x P matrix of outer products, and return D without each group with how many examples it is of."""
    size, n = len(stream.mean), stream.surface.examples
    matrix = torch.zeros(size, size, dtype=torch.float64, device=stream.mean.device)
    parts = [(torch.zeros_like(matrix), torch.zeros_like(matrix[0])) for _ in borders]
    position = 0
    with progress_bar("Gradient noise", -(-n // stream.chunk), progress) as bar:
        for rows in stream.rows():
            matrix += rows.T @ rows
            for (start, stop), (outer, total) in zip(borders, parts, strict=True):
                theirs = rows[max(start - position, 0) : max(stop - position, 0)].double()
                outer += theirs.T @ theirs
                total += theirs.sum(0)
            position += len(rows)
            bar.update()
    others = []
    for (start, stop), (outer, total) in zip(borders, parts, strict=True):
        kept = n - (stop - start)
        mean = -total / kept  # all rows sum to zero
        others.append(((matrix - outer) / kept - torch.outer(mean, mean), kept))
    return matrix, others


def _without(gram: Tensor, borders: list[tuple[int, int]]) -> Iterator[tuple[Tensor, int]]:
    """Yield the Gram matrix over N without each group, centred anew, with how many examples it is of."""
    for start, stop in borders:
        kept = torch.cat([torch.arange(start), torch.arange(stop, len(gram))]).to(gram.device)
        part = gram[kept][:, kept]
        part = part - part.mean(0, keepdim=True)
        yield (part - part.mean(1, keepdim=True)) / len(kept), len(kept)


def _gram(stream: CentredGradients, held: int, progress: bool) -> Tensor:
    """Multiply the N x P centred gradients by their transpose, ``held`` rows at a time against all later ones."""
    n = stream.surface.examples
    gram = torch.zeros(n, n, dtype=torch.float64, device=stream.mean.device)
    starts = range(0, n, held)
    total = sum(-(-(n - start) // stream.chunk) for start in starts)
    with progress_bar("Gradient noise", total, progress) as bar:
        for start in starts:
            block = stream.mean.new_empty(min(held, n - start), len(stream.mean))
            filled, position = 0, start
            for rows in stream.rows(start):
                if filled < len(block):
                    block[filled : filled + len(rows)] = rows
                    filled += len(rows)
                product = block[:filled] @ rows.T
                stop = position + len(rows)
                gram[start : start + filled, position:stop] = product.double()
                gram[position:stop, start : start + filled] = product.T.double()
                position = stop
                bar.update()
    return gram
