"""Does a path turn: the area it sweeps, which is zero on average in equilibrium."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_entropy.diagnostics.estimate import student
from lightning_entropy.diagnostics.figures import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blocks shorter than this many correlation times are not independent; fewer blocks than that say nothing.
_TIMES_PER_BLOCK = 4
_LEAST_BLOCKS = 16


@dataclass(frozen=True)
class ProbabilityCurrent:
    r"""Areas swept per step in planes (i, j): A_ij = 1/2 E [x_i(t) x_j(t+1) - x_j(t) x_i(t+1)].

    Args:
        areas: A, shape (k, k), antisymmetric; A_ij > 0 turns from axis i to axis j. Squared unit of the path a step.
        stderrs: Standard errors from independent blocks, shape (k, k).
        p_value: Probability of a turn this clear, in whichever plane, for a path that looks alike run backwards. NaN
            if the path is too short to say.
        correlation_time: The longest integrated correlation time of a coordinate, steps.
        blocks: Independent blocks that the path was cut into; 0 if it is too short.
    """

    areas: np.ndarray
    stderrs: np.ndarray
    p_value: float
    correlation_time: float
    blocks: int

    @property
    def conclusive(self) -> bool:
        """Whether the path was long enough, in correlation times, for ``p_value`` to mean anything."""
        return not np.isnan(self.p_value)

    @property
    def significance(self) -> float:
        """Largest |area| in standard errors over all planes."""
        upper = np.triu_indices(len(self.areas), 1)
        return float(np.max(np.abs(self.areas[upper]) / np.maximum(self.stderrs[upper], 1e-300)))

    @property
    def verdict(self) -> str:
        """Return in a few words whether the path turns."""
        if not self.conclusive:
            if not np.isfinite(self.correlation_time):
                return "too short to say: it still drifts"
            return f"too short to say: memory of {self.correlation_time:.2g} snapshots"
        clear = f"p = {self.p_value:.2g}, clearest plane {self.significance:.1f} standard errors"
        return f"it turns: {clear}" if self.p_value < 0.01 else f"no turn found: {clear}"

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the area swept in each plane of two axes, with its 99 % error bar where the path was long enough."""
        ax = axes_for(ax)
        i, j = np.triu_indices(len(self.areas), 1)
        errors = student(self.blocks - 1) * self.stderrs[i, j] if self.conclusive else None
        label = "area swept, 99 % interval" if self.conclusive else "area swept"
        ax.errorbar(
            np.arange(len(i)), self.areas[i, j], errors, fmt="o", ms=4, capsize=3, color="tab:blue", label=label
        )
        ax.axhline(0, color="tab:gray", lw=1, ls=":", label="equilibrium")
        ax.set_xticks(np.arange(len(i)), [f"{a + 1}, {b + 1}" for a, b in zip(i, j, strict=True)])
        ax.set_xlim(-0.6, len(i) - 0.4)
        ax.set_xlabel("plane of components")
        ax.set_ylabel("area per snapshot, weight²")
        ax.set_title(self.verdict, fontsize=10)
        ax.legend(fontsize=8)
        return ax.figure, ax  # type: ignore[return-value]


def probability_current(path: np.ndarray, *, shuffles: int = 2000, seed: int = 0) -> ProbabilityCurrent:
    r"""Measure how a stationary path circulates, and how surely.

    A process in equilibrium looks alike run forwards and backwards, and running it backwards reverses the sign of
    every area, so areas average to zero. A current does not: for dx = -(K + Omega) x dt + noise with antisymmetric
    Omega, area is swept at a steady rate (Ghanta, Neu & Teitsworth 2017, doi:10.1103/PhysRevE.95.032128). The path is
    cut into blocks longer than its memory; under the null each block is as likely run backwards, so random signs for
    the blocks give the distribution of the largest |z| over all planes.

    Drift is not a current, but sweeps area all the same (a diffusing path in many dimensions traces smooth arcs in its
    own principal planes), so a path shorter than 64 correlation times gets the p-value NaN: no conclusion.

    Args:
        path: Positions, shape (n, k), n >= 32 steps, k >= 2 coordinates.
        shuffles: Random sign patterns, >= 100; the smallest p-value is 1 / (shuffles + 1).
        seed: Of the signs.

    Returns:
        Areas with errors and a p-value for them all.

    Raises:
        ValueError: If the path is too small or not finite.

    Example:
        >>> turn = np.arange(4000) * np.pi / 2                # a quarter circle a step sweeps half a unit square
        >>> path = np.stack([np.cos(turn), np.sin(turn)], 1)
        >>> found = probability_current(path)
        >>> round(float(found.areas[0, 1]), 3), found.p_value < 0.01
        (0.5, True)
    """
    path = np.asarray(path, dtype=float)
    if path.ndim != 2 or path.shape[0] < 32 or path.shape[1] < 2:
        raise ValueError(f"path must have at least 32 steps of at least 2 coordinates, got shape {path.shape}")
    if not np.isfinite(path).all():
        raise ValueError("path must be finite, got a NaN or an infinity")
    if shuffles < 100:
        raise ValueError(f"shuffles must be at least 100, got {shuffles}")
    x = path - path.mean(0)
    k = x.shape[1]
    i, j = np.triu_indices(k, 1)
    swept = (x[:-1, i] * x[1:, j] - x[:-1, j] * x[1:, i]) / 2  # (n - 1, planes)

    memory = max(correlation_time(x[:, c]) for c in range(k))
    blocks = int(min(256, len(swept) / (_TIMES_PER_BLOCK * memory)))
    conclusive = blocks >= _LEAST_BLOCKS
    blocks = max(blocks, 2)
    length = len(swept) // blocks
    sums = swept[: blocks * length].reshape(blocks, length, -1).mean(1)

    mean, stderr = sums.mean(0), sums.std(0, ddof=1) / np.sqrt(blocks)
    p_value = np.nan
    if conclusive:
        # Under random signs the mean square of the blocks stays, so z is a function of the mean alone.
        square = (sums**2).mean(0)

        def clearest(means: np.ndarray) -> np.ndarray:
            return (means**2 / np.maximum(square - means**2, 1e-12 * square + 1e-300)).max(-1)

        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(shuffles, blocks))
        exceed = int((clearest(signs @ sums / blocks) >= clearest(mean)).sum())
        p_value = (1 + exceed) / (1 + shuffles)

    areas, stderrs = np.zeros((k, k)), np.zeros((k, k))
    areas[i, j], areas[j, i] = swept.mean(0), -swept.mean(0)
    stderrs[i, j] = stderrs[j, i] = stderr
    return ProbabilityCurrent(areas, stderrs, float(p_value), memory, blocks if conclusive else 0)


def correlation_time(series: np.ndarray) -> float:
    """Integrate the autocorrelation of a series over positive lags up to a self-consistent window (Sokal 1997).

    Args:
        series: Shape (n,).

    Returns:
        1/2 + sum of the autocorrelation, in steps, at least 1/2; infinite for a constant series.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> 0.4 < correlation_time(rng.normal(size=10_000)) < 0.6         # white noise: 1/2
        True
    """
    rho = autocorrelation(series[:, None])[:, 0]
    if np.isnan(rho).any():
        return np.inf
    sums = 0.5 + np.cumsum(rho[1:])
    window = np.flatnonzero(np.arange(1, len(rho)) >= 6 * sums)
    return float(max(0.5, sums[window[0]])) if len(window) else np.inf


def autocorrelation(path: np.ndarray, lags: int | None = None) -> np.ndarray:
    """Correlate each column with itself at lags 0, 1, ..., by the FFT of the zero-padded series (biased form).

    Args:
        path: Shape (n, d).
        lags: How many, at most n. None: n // 2.

    Returns:
        Shape (lags, d); 1 at lag 0; NaN for a constant column.

    Example:
        >>> autocorrelation(np.array([[1.0], [-1.0], [1.0], [-1.0]]), 3)[:, 0]
        array([ 1.  , -0.75,  0.5 ])
    """
    n = len(path)
    lags = n // 2 if lags is None else min(lags, n)
    x = path - path.mean(0)
    spectrum = np.fft.rfft(x, 2 * n, axis=0)
    products = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n, axis=0)[:lags]
    scale = products[0]
    constant = scale <= 1e-30 * n + 1e-24 * n * path.mean(0) ** 2
    return np.divide(products, scale, out=np.full_like(products, np.nan), where=~constant)
