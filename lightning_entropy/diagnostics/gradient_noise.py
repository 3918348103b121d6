"""How loud and how round is the noise of SGD: the diffusion matrix of per-example gradients."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from lightning_entropy.diagnostics.data import Batch, batch_size, map_batch, slice_batch
from lightning_entropy.diagnostics.diagnostic import Diagnostic, axes_for
from lightning_entropy.diagnostics.estimate import Estimate
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import Loss, LossSurface, untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class GradientNoiseResult:
    r"""The diffusion matrix D = mean of g g^T - (mean g)(mean g)^T over N examples' gradients g in P dimensions.

    Args:
        weights: P.
        examples: N.
        loss: f(x).
        eigenvalues: The min(N, P) eigenvalues of D that can differ from zero, descending, (loss/weight)^2; the other
            P - min(N, P) are zero.
        gradient_squared: |mean g|^2.
        noise_scale: tr(D) / |g|^2 in examples, of the population that the N were drawn from.
        lr: Learning rate, if known.
        batch_size: Mini-batch size b, if known.
    """

    weights: int
    examples: int
    loss: float
    eigenvalues: np.ndarray
    gradient_squared: float
    noise_scale: Estimate
    lr: float | None = None
    batch_size: int | None = None

    @property
    def trace(self) -> float:
        """tr D: the mean squared distance of an example's gradient from their mean."""
        return float(self.eigenvalues.sum())

    @property
    def mean(self) -> float:
        """Mean of all P eigenvalues, tr(D) / P, zeros included."""
        return self.trace / self.weights

    @property
    def std(self) -> float:
        """Standard deviation of all P eigenvalues, zeros included."""
        return math.sqrt(max(0.0, float((self.eigenvalues**2).sum()) / self.weights - self.mean**2))

    @property
    def threshold(self) -> float:
        """The talk's rule for a zero eigenvalue: largest * P * float32's machine epsilon."""
        return float(max(self.eigenvalues[0], 0.0) * self.weights * np.finfo(np.float32).eps)

    @property
    def rank(self) -> int:
        """How many eigenvalues exceed the talk's threshold: not the algebraic rank."""
        return int((self.eigenvalues > self.threshold).sum())

    @property
    def rank_percent(self) -> float:
        """The talk's rank(D): ``rank`` in per cent of P."""
        return 100 * self.rank / self.weights

    @property
    def clipped_mean(self) -> float:
        """The talk's lambda(D): mean of the P eigenvalues after raising every one to at least ``threshold``."""
        return float(self._clipped_moment(1))

    @property
    def clipped_std(self) -> float:
        """The talk's spread of lambda(D), after the same clip."""
        return math.sqrt(max(0.0, self._clipped_moment(2) - self.clipped_mean**2))

    def _clipped_moment(self, power: int) -> float:
        clipped = np.maximum(self.eigenvalues, self.threshold) ** power
        zeros = self.weights - len(self.eigenvalues)
        return float((clipped.sum() + zeros * self.threshold**power) / self.weights)

    @property
    def stable_rank(self) -> float:
        """tr(D) / largest eigenvalue, in [1, P]: P for round noise."""
        return self.trace / float(self.eigenvalues[0]) if self.eigenvalues[0] > 0 else 0.0

    @property
    def participation(self) -> float:
        """tr(D)^2 / tr(D^2), in [1, P]: how many directions share the noise; P for round noise."""
        squares = float((self.eigenvalues**2).sum())
        return self.trace**2 / squares if squares else 0.0

    @property
    def temperature(self) -> float | None:
        """1 / beta = lr / (2 b), the temperature of SGD's stochastic differential equation; None if unknown."""
        return None if self.lr is None or self.batch_size is None else self.lr / (2 * self.batch_size)

    def minibatch_variance(self, batch_size: int, *, replacement: bool) -> float:
        r"""Predict E |g_b - g|^2 for the mean gradient of a mini-batch of b of these N examples.

        tr(D) / b with replacement; tr(D) / b * (N - b) / (N - 1) without.

        Args:
            batch_size: b, in [1, N] without replacement.
            replacement: Whether an example may be drawn twice.

        Returns:
            (loss/weight)^2.

        Raises:
            ValueError: If ``batch_size`` is out of range.
        """
        n = self.examples
        if batch_size < 1 or (not replacement and batch_size > n):
            raise ValueError(f"batch_size must be in [1, {n}] without replacement and positive with, got {batch_size}")
        return self.trace / batch_size * (1.0 if replacement else (n - batch_size) / (n - 1))

    def scalars(self) -> dict[str, float]:
        """Name the numbers worth a line in a log."""
        numbers = {
            "trace": self.trace,
            "largest": float(self.eigenvalues[0]),
            "mean": self.mean,
            "std": self.std,
            "clipped_mean": self.clipped_mean,
            "clipped_std": self.clipped_std,
            "rank_percent": self.rank_percent,
            "stable_rank": self.stable_rank,
            "participation": self.participation,
            "gradient_squared": self.gradient_squared,
            "noise_scale": self.noise_scale.value,
            "noise_scale_error": self.noise_scale.error,
        }
        return numbers if self.temperature is None else numbers | {"temperature": self.temperature}

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the eigenvalues against their rank, both logarithmic, with the talk's threshold and round noise."""
        ax = axes_for(ax)
        # Beside the largest, less than this is rounding error.
        positive = self.eigenvalues[self.eigenvalues > 1e-6 * self.eigenvalues[0]]
        index = np.arange(1, len(positive) + 1)
        ax.loglog(index, positive, ".", ms=4, color="tab:blue", label=f"eigenvalues of D, {self.examples:,} examples")
        label = r"counted as zero when clipped: $\lambda_1 P \epsilon_{32}$"
        ax.axhline(self.threshold, color="tab:red", lw=1, ls="--", label=label)
        ax.axhline(self.mean, color="tab:gray", lw=1, ls=":", label="round noise of equal power: tr(D) / P")
        ax.set_xlim(0.8, 1.3 * self.weights)
        if len(positive):
            # Room for legend and numbers above and below the curve.
            low, high = min(self.mean, self.threshold, positive[-1]), positive[0]
            ax.set_ylim(low * (low / high) ** 0.45, high * (high / low) ** 0.3)
        ax.set_xlabel(f"rank of the eigenvalue, of {self.weights:,}")
        ax.set_ylabel("eigenvalue of D, (loss / weight)²")
        lines = [
            f"clipped: λ(D) = {self.clipped_mean:.2g} ± {self.clipped_std:.2g}, rank {self.rank_percent:.2g} %",
            f"unclipped: λ(D) = {self.mean:.2g} ± {self.std:.2g}",
            f"stable rank {self.stable_rank:.3g}, participation {self.participation:.3g} directions",
            f"noise scale {self.noise_scale} examples"
            if math.isfinite(self.noise_scale.value)
            else "noise scale: mean gradient lost in the noise",
        ]
        ax.text(0.02, 0.03, "\n".join(lines), transform=ax.transAxes, fontsize=8)
        ax.legend(loc="upper right", fontsize=8)
        ax.set_title(f"Gradient noise, {self.weights:,} weights", fontsize=10)
        return ax.figure, ax  # type: ignore[return-value]


def gradient_noise(
    module: nn.Module,
    data: Iterable[Batch],
    *,
    loss: Loss | None = None,
    examples: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    chunk: int | None = None,
    memory: float = 2.0,
    vectorize: bool = True,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
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
        examples: How many examples of ``data``, N >= 2. None: all.
        lr: Learning rate, for the temperature.
        batch_size: b, for the temperature.
        chunk: Per-example gradients computed at once, >= 1. None: as many as an eighth of ``memory`` holds, at most 64.
        memory: GiB for gradients. The weights' copies, about four vectors of P, and activations come on top.
        vectorize: Compute a chunk by ``vmap``. False: one example at a time, for modules that cannot be vectorized.
        seed: Of the choice of examples.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.

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
    if examples is not None and examples < 2:
        raise ValueError(f"examples must be at least 2, got {examples}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be None or at least 1, got {chunk}")
    with untouched(module, "eval", seed):
        surface = LossSurface(module, data, loss=loss, examples=examples, seed=seed, state=state, transfer=transfer)
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
        stream = _Centred(surface, chunk, vectorize)
        held = max(chunk, (rows - 3 * chunk) // chunk * chunk)
        matrix = _dense(stream, progress) if size <= n else _gram(stream, held, progress)
        eigenvalues = torch.linalg.eigvalsh(matrix / n).cpu().numpy()[::-1].copy()
        return GradientNoiseResult(
            weights=size,
            examples=n,
            loss=surface.value,
            eigenvalues=np.maximum(eigenvalues, 0.0),
            gradient_squared=float(stream.mean @ stream.mean),
            noise_scale=stream.noise_scale(),
            lr=lr,
            batch_size=batch_size,
        )


class _Centred:
    """The gradients of single examples less their mean, chunk by chunk, and sums over the first pass."""

    def __init__(self, surface: LossSurface, chunk: int, vectorize: bool) -> None:
        self.surface, self.chunk, self.vectorize = surface, chunk, vectorize
        self.mean = surface.gradient(surface.weights)
        self._one = grad(lambda w, example: surface.batch_loss(w, map_batch(example, lambda t: t.unsqueeze(0))))
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

    def _chunks(self) -> Iterator[Batch]:
        """Yield the examples in chunks of equal length (but for the last), across the batches' borders."""
        pending: list[Batch] = []
        length = 0
        for batch in self.surface.batches:
            position, size = 0, batch_size(batch)
            while position < size:
                step = min(self.chunk - length, size - position)
                pending.append(slice_batch(batch, position, position + step))
                position, length = position + step, length + step
                if length == self.chunk:
                    yield pending
                    pending, length = [], 0
        if pending:
            yield pending

    def _gradients(self, pieces: list[Batch]) -> Tensor:
        w = self.surface.weights
        parts = [self._vectorized(w, p) if self.vectorize else self._looped(w, p) for p in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _vectorized(self, w: Tensor, piece: Batch) -> Tensor:
        size = batch_size(piece)
        leaves: list[Tensor] = []

        def split(tensor: Tensor) -> Tensor:
            if tensor.ndim and len(tensor) == size:
                leaves.append(tensor)
            return tensor

        map_batch(piece, split)

        def gradient(*values: Tensor) -> Tensor:
            supply = iter(values)
            example = map_batch(piece, lambda t: next(supply) if t.ndim and len(t) == size else t)
            return self._one(w, example)

        try:
            return vmap(gradient, randomness="error")(*leaves)
        except RuntimeError as error:
            raise ValueError(
                "module and loss must work under torch.func.vmap with vectorize=True; pass vectorize=False to take "
                f"one example at a time, got: {error}"
            ) from error

    def _looped(self, w: Tensor, piece: Batch) -> Tensor:
        gradients = []
        for i in range(batch_size(piece)):
            leaf = w.detach().requires_grad_()
            value = self.surface.batch_loss(leaf, slice_batch(piece, i, i + 1))
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


def _dense(stream: _Centred, progress: bool) -> Tensor:
    """Sum the P x P matrix of outer products."""
    size = len(stream.mean)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=stream.mean.device)
    with progress_bar("Gradient noise", -(-stream.surface.examples // stream.chunk), progress) as bar:
        for rows in stream.rows():
            matrix += rows.T @ rows
            bar.update()
    return matrix


def _gram(stream: _Centred, held: int, progress: bool) -> Tensor:
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


class GradientNoise(Diagnostic):
    """Log and draw the gradient noise: :func:`gradient_noise` as a callback, always in eval mode.

    Logged: ``gradient_noise/trace``, ``largest``, ``mean``, ``std``, ``clipped_mean``, ``clipped_std``,
    ``rank_percent`` (the talk's recipe), ``stable_rank``, ``participation``, ``gradient_squared``,
    ``noise_scale`` with its error, and ``temperature`` from the first optimizer's learning rate and the batch size.

    Args:
        chunk: Per-example gradients computed at once. None: as ``memory`` allows.
        memory: GiB for gradients.
        vectorize: False for modules that cannot run under ``vmap``.
        **when: When and on what to measure; see :class:`~lightning_entropy.diagnostics.diagnostic.Diagnostic`.

    Raises:
        ValueError: If ``mode`` is "train": examples are not independent where BatchNorm mixes them.

    Example:
        >>> GradientNoise(every_n_epochs=5, examples=256).name
        'gradient_noise'
    """

    default_name = "gradient_noise"

    def __init__(self, *, chunk: int | None = None, memory: float = 2.0, vectorize: bool = True, **when: Any) -> None:
        super().__init__(**when)
        if self.mode != "eval":
            raise ValueError(f'mode must be "eval" for gradients of single examples, got {self.mode!r}')
        self.chunk, self.memory, self.vectorize = chunk, memory, vectorize
        self._lr: float | None = None
        self._batch_size: int | None = None

    def _run(self, trainer: Any, pl_module: Any) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        self._lr = None if self._lr is None else float(self._lr)
        batch = getattr(trainer.train_dataloader, "batch_size", None)
        self._batch_size = batch and batch * trainer.accumulate_grad_batches * trainer.world_size
        super()._run(trainer, pl_module)

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> GradientNoiseResult:
        """Run :func:`gradient_noise` with the callback's settings."""
        del settings["mode"]
        return gradient_noise(
            module,
            data,
            lr=self._lr,
            batch_size=self._batch_size,
            chunk=self.chunk,
            memory=self.memory,
            vectorize=self.vectorize,
            **settings,
        )
