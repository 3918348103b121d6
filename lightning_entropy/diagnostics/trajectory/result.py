"""What a path of weights shows: its numbers and its pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_entropy.diagnostics.estimate import student
from lightning_entropy.diagnostics.figures import axes_for
from lightning_entropy.diagnostics.trajectory.current import ProbabilityCurrent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TrajectoryResult:
    """What a path of n snapshots of d weights shows, beside an Ornstein-Uhlenbeck control of equal length.

    Args:
        weights: d, the weights watched.
        snapshots: n.
        interval: Steps between snapshots.
        frequencies: Cycles per step, ascending, without zero.
        amplitudes: Fourier amplitude of the increments at each, averaged over weights, in standard
            deviations: sqrt(pi) / 2 for white noise.
        amplitude_stds: Its standard deviation over weights.
        control_amplitudes: The control's.
        lags: Steps.
        autocorrelations: Autocorrelation of the weights at each lag, averaged over weights.
        autocorrelation_stds: Its standard deviation over weights.
        control_autocorrelations: The control's.
        components: Path in its leading principal components, shape (n, k).
        explained: Share of the variance in each, shape (k,).
        current: Areas swept in the planes of the components.
        control_current: The control's, whose true value is zero.
        gradient_norms: Norm of the mini-batch gradient over sqrt(P) at each snapshot; empty if not recorded.
    """

    weights: int
    snapshots: int
    interval: int
    frequencies: np.ndarray
    amplitudes: np.ndarray
    amplitude_stds: np.ndarray
    control_amplitudes: np.ndarray
    lags: np.ndarray
    autocorrelations: np.ndarray
    autocorrelation_stds: np.ndarray
    control_autocorrelations: np.ndarray
    components: np.ndarray
    explained: np.ndarray
    current: ProbabilityCurrent
    control_current: ProbabilityCurrent
    gradient_norms: np.ndarray

    @property
    def low_frequency_excess(self) -> float:
        """Mean amplitude in the lowest tenth of frequencies over that of the control; 1 if it is an OU process."""
        tenth = max(1, len(self.frequencies) // 10)
        return float(self.amplitudes[:tenth].mean() / self.control_amplitudes[:tenth].mean())

    @property
    def panels(self) -> "tuple[Callable[..., Any], ...]":
        """The pictures that belong side by side."""
        return self.plot, self.plot_autocorrelation, self.plot_path

    def scalars(self) -> dict[str, float]:
        """Return the numbers worth a line in a log, by name."""
        numbers = {
            "current_significance": self.current.significance,
            "control_significance": self.control_current.significance,
            "correlation_time": self.current.correlation_time * self.interval,
            "low_frequency_excess": self.low_frequency_excess,
        }
        if self.current.conclusive:
            numbers["current_p_value"] = self.current.p_value
        if len(self.gradient_norms):
            numbers["gradient_norm"] = float(self.gradient_norms[-len(self.gradient_norms) // 10 :].mean())
        return numbers

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the Fourier spectrum of the increments, the control's, and white noise."""
        ax = axes_for(ax)
        f, a, s = _thin(self.frequencies, self.amplitudes, self.amplitude_stds)
        ax.fill_between(f, np.maximum(a - s, 1e-3), a + s, color="tab:blue", alpha=0.2, lw=0)
        ax.plot(f, a, color="tab:blue", lw=1.2, label="weights (mean ± sd)")
        g, c = _thin(self.frequencies, self.control_amplitudes)
        ax.plot(g, c, color="tab:orange", lw=1.2, label="Ornstein-Uhlenbeck control")
        ax.axhline(math.sqrt(math.pi) / 2, color="tab:gray", lw=1, ls=":", label="white noise")
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("frequency, cycles per step")
        ax.set_ylabel("amplitude of the increments, sd")
        ax.set_title(f"{self.snapshots:,} snapshots of {self.weights:,} weights", fontsize=10)
        ax.legend(fontsize=8)
        return ax.figure, ax  # type: ignore[return-value]

    def plot_autocorrelation(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the autocorrelation of the weights, the control's, and the 99 % band of white noise."""
        ax = axes_for(ax)
        mean, std = self.autocorrelations, self.autocorrelation_stds
        ax.fill_between(self.lags, mean - std, mean + std, color="tab:blue", alpha=0.2, lw=0)
        ax.plot(self.lags, mean, color="tab:blue", lw=1.2, label="weights (mean ± sd)")
        ax.plot(
            self.lags, self.control_autocorrelations, color="tab:orange", lw=1.2, label="Ornstein-Uhlenbeck control"
        )
        band = student(math.inf) / math.sqrt(self.snapshots)
        ax.axhspan(-band, band, color="tab:gray", alpha=0.2, lw=0, label="99 % band of white noise")
        ax.set_xlabel("lag, steps")
        ax.set_ylabel("autocorrelation of the weights")
        ax.legend(fontsize=8)
        return ax.figure, ax  # type: ignore[return-value]

    def plot_path(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the path in its two leading components, coloured by time, and say whether it turns."""
        ax = axes_for(ax)
        x, y = self.components[:, :2].T
        ax.plot(x, y, color="tab:gray", lw=0.4, alpha=0.25)
        dots = ax.scatter(x, y, c=np.arange(len(x)) * self.interval, s=6, cmap="viridis", lw=0)
        ax.figure.colorbar(dots, ax=ax, label="steps since the first snapshot")
        ax.set_xlabel(f"principal component 1, {self.explained[0]:.0%} of the variance")
        ax.set_ylabel(f"principal component 2, {self.explained[1]:.0%}")
        ax.set_title(self.current.verdict, fontsize=10)
        return ax.figure, ax  # type: ignore[return-value]


def _thin(x: np.ndarray, *ys: np.ndarray, bins: int = 120) -> list[np.ndarray]:
    """Average within logarithmic bins, for a line that can be read."""
    edges = np.geomspace(x[0], x[-1] * (1 + 1e-9), bins + 1)
    place = np.digitize(x, edges)
    kept = [place == b for b in np.unique(place)]
    return [np.array([values[k].mean() for k in kept]) for values in (x, *ys)]
