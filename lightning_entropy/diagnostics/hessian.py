"""How flat is the minimum: eigenvalues, trace and spectral density of the Hessian of the loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.data import Batch
from lightning_entropy.diagnostics.diagnostic import Diagnostic, axes_for
from lightning_entropy.diagnostics.estimate import Estimate, mean_and_stderr, student
from lightning_entropy.diagnostics.lanczos import extreme_eigenpairs, gauss_quadrature
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import Loss, LossSurface, untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = 1001
_BASIS = 200


@dataclass(frozen=True)
class HessianResult:
    """The spectrum of the Hessian H of a loss over P weights.

    Args:
        weights: P.
        examples: Examples that the loss was averaged over.
        mode: "eval" or "train".
        loss: f(x).
        eigenvalues: Descending: the ``top`` largest, then the smallest; or all P if ``exact``. loss/weight^2.
        eigenvalue_errors: Bounds on their errors (Parlett's, from the residuals).
        trace: tr H, by Hutchinson's estimator.
        grid: Where the density is given, loss/weight^2. Empty if no probes were asked for.
        density: The density of eigenvalues, of integral 1, smoothed by a Gaussian of width ``sigma``.
        density_errors: Half-widths of the pointwise 99 % intervals, from the scatter of the probes.
        sigma: Width of the Gaussian.
        nodes: Quadrature nodes of each probe.
        masses: Their weights, summing to 1 for each probe.
        exact: The spectrum is the dense matrix's own.
    """

    weights: int
    examples: int
    mode: str
    loss: float
    eigenvalues: np.ndarray
    eigenvalue_errors: np.ndarray
    trace: Estimate | None
    grid: np.ndarray
    density: np.ndarray
    density_errors: np.ndarray
    sigma: float
    nodes: tuple[np.ndarray, ...]
    masses: tuple[np.ndarray, ...]
    exact: bool

    @property
    def largest(self) -> float:
        """The largest eigenvalue found, the sharpness; the largest quadrature node if none was asked for."""
        return float(self._ends()[1])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue found."""
        return float(self._ends()[0])

    def _ends(self) -> tuple[float, float]:
        known = [self.eigenvalues] if len(self.eigenvalues) else list(self.nodes)
        return (min(v.min() for v in known), max(v.max() for v in known)) if known else (np.nan, np.nan)

    def near_zero(self, width: float = 1e-4) -> tuple[float, float]:
        r"""Bound the fraction of eigenvalues with |lambda| <= ``width``: the talk's "94 % are within 1e-4 of zero".

        Exact for a dense spectrum (both bounds equal). Otherwise the Chebyshev-Markov-Stieltjes inequalities: for
        each probe the distribution at a Gauss node lies between the sums of the weights before and up to it. Their
        averages over probes are widened by the probes' 99 % error bar. Many Lanczos steps narrow the bracket.

        Args:
            width: > 0, loss/weight^2.

        Returns:
            Lower and upper bound, in [0, 1].
        """
        if self.exact:
            fraction = float((np.abs(self.eigenvalues) <= width).mean())
            return fraction, fraction
        if not self.nodes:
            return 0.0, 1.0
        brackets = [_mass_within(t, m, width) for t, m in zip(self.nodes, self.masses, strict=True)]
        low, high = np.array(brackets).T
        spread = [0.0, 0.0]
        if len(low) > 1:
            spread = [student(len(b) - 1) * b.std(ddof=1) / np.sqrt(len(b)) for b in (low, high)]
        return max(0.0, float(low.mean() - spread[0])), min(1.0, float(high.mean() + spread[1]))

    def scalars(self) -> dict[str, float]:
        """Name the numbers worth a line in a log."""
        numbers = {"loss": self.loss, "largest": self.largest, "smallest": self.smallest}
        if self.trace is not None:
            numbers |= {"trace": self.trace.value, "trace_error": self.trace.error}
        if self.exact or self.nodes:
            numbers["near_zero_low"], numbers["near_zero_high"] = self.near_zero()
        return numbers

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the density with its error band and the extreme eigenvalues as ticks; a histogram if exact."""
        ax = axes_for(ax)
        if self.exact:
            self._plot_histogram(ax)
        elif len(self.grid):
            self._plot_density(ax)
        else:
            ax.vlines(self.eigenvalues, 0, 1, color="tab:red", lw=1.5)
            ax.set(ylim=(0, 1.4), yticks=[])
        ax.set_xlabel("eigenvalue λ of the Hessian, loss / weight²")
        lines = [f"largest {self.largest:.3g}, smallest {self.smallest:.3g}"]
        if self.trace is not None:
            lines.append(f"trace {self.trace}")
        low, high = self.near_zero()
        if high - low < 0.5:
            lines.append("|λ| ≤ 1e-4: " + (f"{low:.1%}" if self.exact else f"{low:.0%} to {high:.0%}"))
        x, side = (0.02, "left") if self.exact else (0.98, "right")
        ax.text(x, 0.96, "\n".join(lines), transform=ax.transAxes, ha=side, va="top", fontsize=9)
        kind = "all eigenvalues" if self.exact else f"{len(self.nodes)} random probes" if self.nodes else "no density"
        ax.set_title(
            f"Hessian, {self.weights:,} weights, {self.examples:,} examples, {self.mode} mode, {kind}", fontsize=10
        )
        return ax.figure, ax  # type: ignore[return-value]

    def _plot_histogram(self, ax: "Axes") -> None:
        """Count in quarter decades on both sides of zero; the middle bar is what is nearly zero."""

        def edges(end: float) -> np.ndarray:
            return 10.0 ** np.arange(-4, np.ceil(4 * np.log10(max(end, 1e-3))) / 4 + 0.1, 0.25)

        below, above = edges(-self.smallest), edges(self.largest)
        ax.hist(self.eigenvalues, np.r_[-below[::-1], above], color="tab:blue", edgecolor="white", lw=0.4)
        ax.set_xscale("symlog", linthresh=1e-4, linscale=0.5)
        every = 2 if np.log10(above[-1] / 1e-4) + np.log10(below[-1] / 1e-4) > 7 else 1
        powers = range(-4, int(np.floor(np.log10(max(above[-1], below[-1])))) + 1, every)
        ticks = np.array([-(10.0**p) for p in powers][::-1] + [0.0] + [10.0**p for p in powers])
        ax.set_xticks(ticks[(ticks >= -below[-1]) & (ticks <= above[-1])])
        ax.set_xlim(-1.3 * below[-1], 1.3 * above[-1])
        ax.set_yscale("log")
        # A single eigenvalue is a bar that shows; above the tallest there is room for the text.
        tallest = max(2.0, max((bar.get_height() for bar in ax.patches), default=2.0))  # type: ignore[attr-defined]
        ax.set_ylim(0.5, 0.5 * (tallest / 0.5) ** 1.35)
        ax.set_ylabel("number of eigenvalues")

    def _plot_density(self, ax: "Axes") -> None:
        # One eigenvalue in P, smoothed, is the least that there is to see.
        floor = 0.3 / (self.weights * self.sigma * np.sqrt(2 * np.pi))
        low, high = self.density - self.density_errors, self.density + self.density_errors
        ax.fill_between(
            self.grid,
            np.maximum(low, floor),
            np.maximum(high, floor),
            color="tab:blue",
            alpha=0.25,
            lw=0,
            label="99 % interval",
        )
        label = f"density, smoothed by {self.sigma:.1g}"
        ax.plot(self.grid, np.maximum(self.density, floor), color="tab:blue", lw=1.3, label=label)
        if len(self.eigenvalues):
            ax.vlines(
                self.eigenvalues,
                0,
                0.03,
                color="tab:red",
                lw=1.5,
                transform=ax.get_xaxis_transform(),
                label="computed eigenvalues",
            )
        ax.set_yscale("log")
        ax.set_xlim(self.grid[0], self.grid[-1])
        ax.set_ylim(floor, 2 * high.max())
        ax.set_ylabel("density of eigenvalues")
        ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.8))


def _mass_within(nodes: np.ndarray, masses: np.ndarray, width: float) -> tuple[float, float]:
    before = np.r_[0.0, 0.0, np.cumsum(masses), 1.0]  # Below t with i nodes <= t: between before[i] and before[i + 2].
    right, left = np.searchsorted(nodes, width, "right"), np.searchsorted(nodes, -width, "left")
    low = before[max(right, 0)] - before[left + 2]
    high = before[right + 2] - before[left]
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def hessian_spectrum(
    module: nn.Module,
    data: Iterable[Batch],
    *,
    loss: Loss | None = None,
    top: int = 5,
    bottom: int = 1,
    probes: int = 8,
    steps: int = 40,
    sigma: float | None = None,
    tolerance: float = 1e-4,
    dense_limit: int = 1000,
    memory: float = 8.0,
    examples: int | None = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
) -> HessianResult:
    r"""Measure the Hessian of f(x) = mean loss: extreme eigenvalues, tr H and the density of eigenvalues.

    Extreme eigenvalues by Lanczos (:func:`~lightning_entropy.diagnostics.lanczos.extreme_eigenpairs`). Then from
    Rademacher probes z, with U the eigenvectors found and Pi = I - U U^T,

        tr H = sum u^T H u + E (Pi z)^T H (Pi z)        Hutchinson (1990), deflated as in Hutch++ (Meyer et al. 2021)

    so that the outliers, which carry most of the variance, are summed exactly; and the density by stochastic
    Lanczos quadrature from the same probes (Ghorbani et al. 2019, arXiv:1901.10159). The trace costs no product
    beyond the density's; ``steps=1`` gives the trace alone, ``probes=0`` the eigenvalues alone.

    Args:
        module: The network, at the weights to measure.
        data: A loader or an iterable of batches.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        top: How many of the largest eigenvalues, >= 0.
        bottom: How many of the smallest, >= 0.
        probes: Random probes for trace and density: 0, or >= 2 for an error bar.
        steps: Lanczos steps of each probe, >= 1: the density resolves about range / steps.
        sigma: Smoothing of the density, > 0, loss/weight^2. None: 1 % of the range of the spectrum.
        tolerance: Error of the extreme eigenvalues relative to the largest in modulus, > 0.
        dense_limit: With no more weights than this, build the matrix and compute all eigenvalues.
        memory: GiB for Lanczos vectors. Each chain needs ``steps + 4`` vectors of P numbers.
        examples: How many examples of ``data``. None: all.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of probes, examples and dropout.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.

    Returns:
        The numbers, with error bars; see :class:`HessianResult`.

    Raises:
        ValueError: If an argument is out of range, the data is empty, nothing is trainable, the loss is not a finite
            scalar, or ``memory`` does not hold one chain.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)                   # f = mean (w . x)^2 / 2, so H = mean x x^T
        >>> data = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
        >>> result = hessian_spectrum(net, data, loss=lambda m, x: m(x).square().mean() / 2)
        >>> result.eigenvalues.tolist(), result.trace.value
        ([2.0, 0.5], 2.5)
    """
    for name, count in (("top", top), ("bottom", bottom), ("dense_limit", dense_limit)):
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")
    if probes < 0 or probes == 1:
        raise ValueError(f"probes must be 0 or at least 2, got {probes}")
    for name, number in (("steps", steps), ("tolerance", tolerance), ("memory", memory), ("sigma", sigma or 1.0)):
        if number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")

    with untouched(module, mode, seed):
        surface = LossSurface(
            module, data, loss=loss, examples=examples, mode=mode, seed=seed, state=state, transfer=transfer
        )
        size = len(surface)
        if size <= dense_limit:
            return _dense(surface, top + bottom, sigma, progress)
        gib = size * surface.weights.element_size() / 2**30
        vectors = int(memory / gib)
        needed = max(2 * (top + bottom) + 6 if top + bottom else 0, min(steps, size) + 4 if probes else 0)
        if vectors < needed:
            raise ValueError(
                f"memory must be at least {needed * gib:.3g} GiB for {needed} vectors of {size:,} weights, got {memory}"
            )
        return _iterative(surface, top, bottom, probes, steps, sigma, tolerance, vectors, seed, progress)


def _iterative(
    surface: LossSurface,
    top: int,
    bottom: int,
    probes: int,
    steps: int,
    sigma: float | None,
    tolerance: float,
    vectors: int,
    seed: int,
    progress: bool,
) -> HessianResult:
    size, x = len(surface), surface.weights
    generator = torch.Generator(surface.device).manual_seed(seed)
    # Chains run abreast only where they can share a batch's gradient graph.
    abreast = 1 if len(surface.batches) == 1 else max(1, min(probes, vectors // (min(steps, size) + 4)))

    values, errors = np.empty(0), np.empty(0)
    eigenvectors = x.new_empty(0, size)
    if top + bottom:
        most = max(300, 20 * (top + bottom))
        with progress_bar("Hessian eigenvalues", most, progress) as bar:

            def products(v: Tensor) -> Tensor:
                bar.update()
                return surface.hessian_products(x, v)

            values, errors, eigenvectors = extreme_eigenpairs(
                products,
                size,
                top=top,
                bottom=bottom,
                tolerance=tolerance,
                max_products=most,
                basis_size=min(_BASIS + 2 * (top + bottom), vectors - 4),
                generator=generator,
                dtype=x.dtype,
            )

    nodes: list[np.ndarray] = []
    masses: list[np.ndarray] = []
    forms: list[Tensor] = []
    theta = torch.from_numpy(values).to(x)
    with progress_bar("Hessian density", -(-probes // abreast) * min(steps, size), progress) as bar:
        for start in range(0, probes, abreast):
            shape = min(abreast, probes - start), size
            z = torch.randint(0, 2, shape, generator=generator, device=x.device).to(x.dtype).mul_(2).sub_(1)
            theirs, weights, hz = gauss_quadrature(lambda v: surface.hessian_products(x, v), z, steps, tick=bar.update)
            nodes += theirs
            masses += weights
            inside, crossed = z @ eigenvectors.T, hz @ eigenvectors.T
            forms.append((z * hz).sum(1) - 2 * (inside * crossed).sum(1) + (inside**2 * theta).sum(1))
    trace = None
    if probes:
        rest = Estimate.of(torch.cat(forms))
        trace = Estimate(rest.value + float(values.sum()), rest.stderr, rest.dof)
    return _result(surface, values, errors, trace, nodes, masses, sigma, exact=False)


def _dense(surface: LossSurface, wanted: int, sigma: float | None, progress: bool) -> HessianResult:
    size, x = len(surface), surface.weights
    matrix = torch.empty(size, size, dtype=torch.float64)
    block = 64
    with progress_bar("Hessian, dense", -(-size // block), progress) as bar:
        for start in range(0, size, block):
            rows = torch.zeros(min(block, size - start), size, dtype=x.dtype, device=x.device)
            rows[range(len(rows)), range(start, start + len(rows))] = 1
            matrix[start : start + len(rows)] = surface.hessian_products(x, rows)
            bar.update()
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()[::-1].copy()
    errors = np.full(size, torch.finfo(x.dtype).eps * np.abs(values).max())
    trace = Estimate(float(values.sum()))
    masses = np.full(size, 1 / size)
    return _result(surface, values, errors, trace, [values[::-1]], [masses], sigma, exact=True)


def _result(
    surface: LossSurface,
    values: np.ndarray,
    errors: np.ndarray,
    trace: Estimate | None,
    nodes: list[np.ndarray],
    masses: list[np.ndarray],
    sigma: float | None,
    *,
    exact: bool,
) -> HessianResult:
    grid = density = density_errors = np.empty(0)
    width = sigma or 0.0
    if nodes:
        low, high = min(n.min() for n in nodes), max(n.max() for n in nodes)
        width = sigma or 0.01 * max(high - low, 1e-3 * abs(high), 1e-12)
        grid = np.linspace(low - 4 * width, high + 4 * width, _GRID)
        curves = np.array([smoothed_density(n, m, grid, width) for n, m in zip(nodes, masses, strict=True)])
        density, density_errors = curves[0], np.zeros(_GRID)
        if not exact:
            mean, stderr, dof = mean_and_stderr(torch.from_numpy(curves))
            density, density_errors = mean.numpy(), stderr.numpy() * student(dof)
    return HessianResult(
        weights=len(surface),
        examples=surface.examples,
        mode=surface.mode,
        loss=surface.value,
        eigenvalues=values,
        eigenvalue_errors=errors,
        trace=trace,
        grid=grid,
        density=density,
        density_errors=density_errors,
        sigma=width,
        nodes=tuple(nodes),
        masses=tuple(masses),
        exact=exact,
    )


def smoothed_density(nodes: np.ndarray, masses: np.ndarray, grid: np.ndarray, sigma: float) -> np.ndarray:
    """Sum Gaussians of width ``sigma`` and the given masses, centred on the nodes, on a grid.

    Args:
        nodes: Shape (n,).
        masses: Shape (n,); the density integrates to their sum.
        grid: Shape (m,), the unit of ``nodes``.
        sigma: > 0, the unit of ``nodes``.

    Returns:
        Shape (m,), 1 / unit of ``nodes``.

    Example:
        >>> smoothed_density(np.array([0.0]), np.array([1.0]), np.array([0.0]), 1.0).round(4)   # 1 / sqrt(2 pi)
        array([0.3989])
    """
    density = np.zeros(len(grid))
    for start in range(0, len(nodes), 1024):
        part = slice(start, start + 1024)
        kernel = np.exp(-0.5 * ((grid[:, None] - nodes[None, part]) / sigma) ** 2)
        density += kernel @ masses[part]
    return density / (sigma * np.sqrt(2 * np.pi))


class HessianSpectrum(Diagnostic):
    """Log and draw the Hessian's spectrum: :func:`hessian_spectrum` as a callback.

    Logged: ``hessian/largest``, ``smallest``, ``trace``, ``trace_error``, ``near_zero_low``, ``near_zero_high`` and
    ``loss``. Costs about ``20 top + probes * steps`` Hessian-vector products, each three to four times a
    forward and backward pass over ``examples`` examples.

    Args:
        top: See :func:`hessian_spectrum`, as for the next four.
        bottom: How many of the smallest eigenvalues.
        probes: Random probes for trace and density.
        steps: Lanczos steps of each probe.
        dense_limit: With no more weights than this, the exact spectrum.
        memory: GiB for Lanczos vectors.
        **when: When, on what and how to measure; see :class:`~lightning_entropy.diagnostics.diagnostic.Diagnostic`.

    Example:
        >>> HessianSpectrum(every_n_epochs=10, examples=512).name
        'hessian'
    """

    default_name = "hessian"

    def __init__(
        self,
        *,
        top: int = 5,
        bottom: int = 1,
        probes: int = 8,
        steps: int = 40,
        dense_limit: int = 1000,
        memory: float = 8.0,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        self.top, self.bottom, self.probes, self.steps = top, bottom, probes, steps
        self.dense_limit, self.memory = dense_limit, memory

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> HessianResult:
        """Run :func:`hessian_spectrum` with the callback's settings."""
        return hessian_spectrum(
            module,
            data,
            top=self.top,
            bottom=self.bottom,
            probes=self.probes,
            steps=self.steps,
            dense_limit=self.dense_limit,
            memory=self.memory,
            **settings,
        )
