"""Groups of examples: what the loss is on each, so that a number's error is what other examples would have changed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.surface import LossSurface


@dataclass(frozen=True)
class _Part:
    """Some examples of one batch.

    Args:
        batch: They.
        index: Of the whole batch, for its dropout.
        size: How many.
    """

    batch: Batch
    index: int
    size: int


class Groups:
    """The examples of a surface in groups of equal size, in their order; batches are cut where that can be done.

    In train mode, where BatchNorm normalises by the batch, and where batches do not say how to be cut, groups are of
    whole batches.

    Args:
        surface: Over all examples.
        count: How many groups, at most: there are fewer where there is less to divide. Fewer than two: none.

    Attributes:
        shares: Each group's share of the examples, shape (G,), summing to 1.

    Example:
        >>> net, data = torch.nn.Linear(1, 1, bias=False), [torch.ones(3, 1), torch.ones(1, 1)]
        >>> surface = LossSurface(net, data, loss=lambda m, x: m(x).square().mean())
        >>> len(Groups(surface, 2)), Groups(surface, 2).shares.tolist(), len(Groups(surface, 1))
        (2, [0.5, 0.5], 0)
    """

    def __init__(self, surface: LossSurface, count: int) -> None:
        self.surface = surface
        parts = [_Part(b, i, surface.layout.size(b)) for i, b in enumerate(surface.batches)]
        count = min(count, surface.examples)
        cut = _cut(surface, parts, count) if count > 1 and surface.mode == "eval" else None
        groups = cut or (_whole(parts, count) if count > 1 else [])
        self._groups = groups if len(groups) > 1 else []
        sizes = np.array([sum(part.size for part in group) for group in self._groups])
        self.shares = sizes / surface.examples

    def __len__(self) -> int:
        return len(self._groups)

    def hessian_products(self, vectors: Tensor) -> Iterator[Tensor]:
        """Multiply vectors, shape (k, P), by the Hessian of each group's mean loss in turn."""
        for group in self._groups:
            size = sum(part.size for part in group)
            shares = [[part.size / size] * len(vectors) for part in group]
            yield self._products(vectors, group, shares)

    def resampled_products(self, vectors: Tensor, counts: np.ndarray) -> Tensor:
        """Multiply each of k vectors, shape (k, P), by the Hessian where group g counts ``counts[k, g]`` times."""
        parts, shares = [], []
        total = self.surface.examples * (counts @ self.shares)
        for g, group in enumerate(self._groups):
            for part in group:
                parts.append(part)
                shares.append((counts[:, g] * part.size / total).tolist())
        return self._products(vectors, parts, shares)

    def losses(self, weights: Tensor) -> Tensor:
        """Evaluate the mean loss of each group at ``weights``, shape (P,), in (G,), float64."""
        found = []
        with torch.no_grad():
            for group in self._groups:
                size = sum(part.size for part in group)
                values = [self.surface.batch_loss(weights, p.batch, p.index).double() * (p.size / size) for p in group]
                found.append(torch.stack(values).sum())
        return torch.stack(found)

    def _products(self, vectors: Tensor, parts: list[_Part], shares: list[list[float]]) -> Tensor:
        products = torch.zeros_like(vectors)
        for part, share in zip(parts, shares, strict=True):
            counted = [k for k, weight in enumerate(share) if weight]
            if not counted:
                continue
            theirs = self.surface.batch_products(self.surface.weights, vectors[counted], part.batch, part.index)
            for k, product in zip(counted, theirs, strict=True):
                products[k].add_(product, alpha=share[k])
        return products

    def resampling(self, times: int, seed: int) -> np.ndarray:
        """Draw as many groups as there are with replacement, ``times`` times: how often each, shape (times, G)."""
        n = len(self)
        drawn = np.random.default_rng(seed).integers(n, size=(times, n))
        return (drawn[:, :, None] == np.arange(n)).sum(1).astype(float)


def _whole(parts: list[_Part], count: int) -> list[list[_Part]]:
    place = np.arange(len(parts)) * min(count, len(parts)) // len(parts)
    return [[part for part, p in zip(parts, place, strict=True) if p == g] for g in np.unique(place)]


def _cut(surface: LossSurface, parts: list[_Part], count: int) -> list[list[_Part]] | None:
    """Cut batches at the borders of equal groups; None where one cannot be cut."""
    borders = [round(surface.examples * g / count) for g in range(1, count + 1)]
    groups: list[list[_Part]] = [[] for _ in range(count)]
    position = 0
    try:
        for part in parts:
            start = 0
            while start < part.size:
                g = next(g for g, border in enumerate(borders) if position + start < border)
                stop = min(part.size, borders[g] - position)
                cut = surface.layout.cut(part.batch, start, stop)
                if surface.layout.size(cut) != stop - start:
                    return None
                groups[g].append(_Part(cut, part.index, stop - start))
                start = stop
            position += part.size
    except ValueError:
        return None
    return groups
