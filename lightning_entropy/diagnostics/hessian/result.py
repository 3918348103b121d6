"""What is known of a Hessian's spectrum: its numbers and its picture."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_entropy.diagnostics.estimate import Estimate, student
from lightning_entropy.diagnostics.figures import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        """Return the numbers worth a line in a log, by name."""
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
