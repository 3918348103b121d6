"""The gradient of the loss at every single example, a chunk of them at a time."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_entropy.diagnostics.estimate import Estimate
from lightning_entropy.diagnostics.examples import Batch, Layout, cut_along, leaves, map_batch
from lightning_entropy.diagnostics.surface import LossSurface


@dataclass(frozen=True)
class Piece:
    """Some examples of a batch, which are cut in the same dimensions however few are left.

    Args:
        batch: The examples.
        size: How many.
        dims: The dimension that counts them in each tensor.
        lists: Whether there is a list of one number or string for each example.
    """

    batch: Batch
    size: int
    dims: Sequence[int | None]
    lists: bool

    @classmethod
    def of(cls, batch: Batch, layout: Layout) -> "Piece":
        """Return a whole batch, with what its layout says of it; one example need not be cut."""
        size = layout.size(batch)
        return (
            cls(batch, size, (), lists=False)
            if size == 1
            else cls(batch, size, layout.cuts(batch), layout.lists(batch))
        )

    def cut(self, start: int, stop: int) -> "Piece":
        """Take some of the examples."""
        if (start, stop) == (0, self.size):
            return self
        batch = cut_along(self.batch, self.dims, self.size, start, stop)
        return Piece(batch, stop - start, self.dims, self.lists)


class CentredGradients:
    """The gradients of single examples less their mean, chunk by chunk, and sums over the first pass.

    Where there is no memory to take a chunk's examples side by side, half as many are from there on, with a warning.
    """

    def __init__(self, surface: LossSurface, chunk: int, vectorize: bool) -> None:
        self.surface, self.chunk, self.vectorize = surface, chunk, vectorize
        self._abreast = chunk
        self.mean = surface.gradient(surface.weights)
        self.squares: list[Tensor] = []  # |g_k - g|^2
        self.along: list[Tensor] = []  # (g_k - g) . g
        self._sum = torch.zeros_like(self.mean, dtype=torch.float64)

    def rows(self, start: int = 0) -> Iterator[Tensor]:
        """Yield centred gradients, shape (<= chunk, P), of the examples from ``start``, a multiple of the chunk, on."""
        first = start == 0 and not self.squares
        position = 0
        for batch in self._chunks():
            position += 1
            if (position - 1) * self.chunk < start:
                continue
            gradients = self._gradients(batch).sub_(self.mean)
            if first:
                self.squares.append(gradients.square().sum(1).double())
                self.along.append((gradients @ self.mean).double())
                self._sum += gradients.sum(0)
            yield gradients
        if first:
            self._check()

    def _chunks(self) -> Iterator[list[Piece]]:
        """Yield the examples in chunks of equal length (but for the last), across the batches' borders."""
        pending: list[Piece] = []
        length = 0
        for batch in self.surface.batches:
            whole = Piece.of(batch, self.surface.layout)
            position = 0
            while position < whole.size:
                step = min(self.chunk - length, whole.size - position)
                pending.append(whole.cut(position, position + step))
                position, length = position + step, length + step
                if length == self.chunk:
                    yield pending
                    pending, length = [], 0
        if pending:
            yield pending

    def _gradients(self, pieces: list[Piece]) -> Tensor:
        while True:
            try:
                parts = [self._gradients_of(part) for piece in pieces for part in self._parts(piece)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError:
                if self._abreast == 1:
                    raise
            before, self._abreast = self._abreast, -(-self._abreast // 2)
            warnings.warn(
                f"no memory for the gradients of {before} examples side by side: {self._abreast} are taken from here "
                f"on, as chunk={self._abreast} would",
                stacklevel=2,
            )

    def _parts(self, piece: Piece) -> Iterator[Piece]:
        for start in range(0, piece.size, self._abreast):
            yield piece.cut(start, min(start + self._abreast, piece.size))

    def _gradients_of(self, piece: Piece) -> Tensor:
        w = self.surface.weights
        if self.vectorize and piece.size > 1 and not piece.lists:
            return self._vectorized(w, piece)
        return self._looped(w, piece)

    def _vectorized(self, w: Tensor, piece: Piece) -> Tensor:
        split = [(t, dim) for t, dim in zip(leaves(piece.batch), piece.dims, strict=True) if dim is not None]

        def loss(w: Tensor, *values: Tensor) -> Tensor:
            supply, dims = iter(values), iter(piece.dims)

            def example(tensor: Tensor) -> Tensor:
                dim = next(dims)
                return tensor if dim is None else next(supply).unsqueeze(dim)

            return self.surface.batch_loss(w, map_batch(piece.batch, example))

        try:
            in_dims = (None, *(dim for _, dim in split))
            return vmap(grad(loss), in_dims=in_dims, randomness="error")(w, *(t for t, _ in split))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "module and loss must work under torch.func.vmap with vectorize=True; pass vectorize=False to take "
                f"one example at a time, got: {error}"
            ) from error

    def _looped(self, w: Tensor, piece: Piece) -> Tensor:
        gradients = []
        for i in range(piece.size):
            leaf = w.detach().requires_grad_()
            value = self.surface.batch_loss(leaf, piece.cut(i, i + 1).batch)
            gradients.append(torch.autograd.grad(value, leaf)[0])
        return torch.stack(gradients)

    def _check(self) -> None:
        drift = self._sum.norm().item() / self.surface.examples
        scale = math.sqrt(torch.cat(self.squares).mean().item()) + self.mean.norm().item()
        if not math.isfinite(drift):
            raise ValueError("gradients of single examples must be finite, got a NaN or an infinity")
        if drift > 1e-2 * scale:
            raise ValueError(
                "loss must be a mean over the examples of a batch: the mean of single examples' gradients must be the "
                f"batch's, got a difference of {drift:.3g} beside gradients of {scale:.3g}"
            )

    def noise_scale(self) -> Estimate:
        """tr(D) / |g|^2 with both freed of their bias; the error by the delta method over examples."""
        squares, along = torch.cat(self.squares), torch.cat(self.along)
        n = len(squares)
        mean_squared = self.mean.double().square().sum()
        trace = squares.sum() / (n - 1)
        signal = mean_squared - trace / n
        if signal <= 0:
            return Estimate(math.inf, math.inf, n - 1)
        ratio = trace / signal
        influence = (squares - trace) / signal - ratio * (2 * along - (squares - trace) / n) / signal
        return Estimate(float(ratio), float(influence.std() / math.sqrt(n)), n - 1)
