"""What is known of a Hessian's spectrum: its numbers and its picture."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_entropy.diagnostics.estimate import Estimate, GroupValues, student
from lightning_entropy.diagnostics.figures import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ByGroup:
    """What the Hessian H_g of each of G groups of examples is, in the directions that the whole one's has.

    Args:
        shares: Of the examples, shape (G,), summing to 1.
        curvatures: u^T H_g u for the k eigenvectors u of the whole H, shape (G, k).
        traces: tr H_g, shape (G,); None if no trace was asked for.
    """

    shares: np.ndarray
    curvatures: np.ndarray
    traces: np.ndarray | None


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
        trace: tr H, by Hutchinson's estimator, with the error of its probes.
        grid: Where the density is given, loss/weight^2. Empty if no probes were asked for.
        density: The density of eigenvalues, of integral 1, smoothed by a Gaussian of width ``sigma``.
        density_errors: Half-widths of the pointwise 99 % intervals, from the scatter of the probes and, with groups, of
            the examples.
        sigma: Width of the Gaussian.
        nodes: Quadrature nodes of each probe.
        masses: Their weights, summing to 1 for each probe.
        exact: The spectrum is the dense matrix's own.
        by_group: What groups of examples have, whose scatter is the error of their choice. None: no groups.
        resampled: Nodes and masses on examples drawn anew: for each probe, or several if ``exact``.
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
    by_group: ByGroup | None = None
    resampled: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def largest(self) -> float:
        """The largest eigenvalue found, the sharpness; the largest quadrature node if none was asked for."""
        return float(self._ends()[1])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue found."""
        return float(self._ends()[0])

    def eigenvalue_groups(self, index: int) -> GroupValues | None:
        """Return an eigenvalue on each group of examples, to first order; None without groups or eigenvalues."""
        if self.by_group is None or not self.by_group.curvatures.size:
            return None
        return GroupValues(self.by_group.curvatures[:, index], self.by_group.shares)

    @property
    def trace_groups(self) -> GroupValues | None:
        """The trace on each group of examples; None without groups or trace."""
        if self.by_group is None or self.by_group.traces is None:
            return None
        return GroupValues(self.by_group.traces, self.by_group.shares)

    def eigenvalue_estimate(self, index: int) -> Estimate:
        """Return an eigenvalue with its error: of Lanczos and, with groups, of the choice of examples."""
        own = Estimate(float(self.eigenvalues[index]), float(self.eigenvalue_errors[index]) / student(math.inf))
        groups = self.eigenvalue_groups(index)
        return own if groups is None else own.widened(groups.estimate)

    @property
    def trace_estimate(self) -> Estimate | None:
        """The trace with its error: of the probes and, with groups, of the choice of examples."""
        groups = self.trace_groups
        return self.trace if self.trace is None or groups is None else self.trace.widened(groups.estimate)

    def _ends(self) -> tuple[float, float]:
        known = [self.eigenvalues] if len(self.eigenvalues) else list(self.nodes)
        return (min(v.min() for v in known), max(v.max() for v in known)) if known else (np.nan, np.nan)

    def near_zero(self, width: float = 1e-4) -> tuple[float, float]:
        r"""Bound the fraction of eigenvalues with |lambda| <= ``width``: the talk's "94 % are within 1e-4 of zero".

        Exact for a dense spectrum (both bounds equal). Otherwise the Chebyshev-Markov-Stieltjes inequalities: for
        each probe the distribution at a Gauss node lies between the sums of the weights before and up to it. Their
        averages over probes are widened by the probes' 99 % error bar. Many Lanczos steps narrow the bracket. With
        groups of examples both are wider by the 99 % error bar of the examples' choice.

        Args:
            width: > 0, loss/weight^2.

        Returns:
            Lower and upper bound, in [0, 1].
        """
        if self.exact:
            fraction = float((np.abs(self.eigenvalues) <= width).mean())
            moved = np.array([(np.abs(nodes) <= width).mean() - fraction for nodes, _ in self.resampled])
            spread = student(len(moved)) * np.sqrt((moved**2).mean()) if len(moved) else 0.0
            return max(0.0, fraction - spread), min(1.0, fraction + spread)
        if not self.nodes:
            return 0.0, 1.0
        brackets = [_mass_within(t, m, width) for t, m in zip(self.nodes, self.masses, strict=True)]
        low, high = np.array(brackets).T
        spread = np.zeros(2)
        if len(low) > 1:
            spread = np.array([student(len(b) - 1) * b.std(ddof=1) / np.sqrt(len(b)) for b in (low, high)])
        if self.resampled:
            others = np.array([_mass_within(t, m, width) for t, m in self.resampled]).T
            moved = student(others.shape[1]) * np.sqrt(((others - np.array([low, high])) ** 2).mean(1))
            spread = np.hypot(spread, moved)
        return max(0.0, float(low.mean() - spread[0])), min(1.0, float(high.mean() + spread[1]))

    def scalars(self) -> dict[str, float]:
        """Return the numbers worth a line in a log, by name."""
        numbers = {"loss": self.loss, "largest": self.largest, "smallest": self.smallest}
        if self.by_group is not None and len(self.eigenvalues):
            numbers["largest_error"] = self.eigenvalue_estimate(0).error
        if (trace := self.trace_estimate) is not None:
            numbers |= {"trace": trace.value, "trace_error": trace.error}
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
        if self.by_group is not None and len(self.eigenvalues):
            lines = [f"largest {self.eigenvalue_estimate(0)}", f"smallest {self.eigenvalue_estimate(-1)}"]
        if self.trace is not None:
            lines.append(f"trace {self.trace_estimate}")
        low, high = self.near_zero()
        if high - low < 0.5:
            lines.append("|λ| ≤ 1e-4: " + (f"{low:.1%}" if low == high else f"{low:.0%} to {high:.0%}"))
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
        borders = np.r_[-below[::-1], above]
        counts, _, _ = ax.hist(self.eigenvalues, borders, color="tab:blue", edgecolor="white", lw=0.4)
        if self.resampled:
            others = np.array([np.histogram(nodes, borders)[0] for nodes, _ in self.resampled])
            error = student(len(others)) * np.sqrt(((others - counts) ** 2).mean(0))
            low, high = np.maximum(counts - error, 0), counts + error
            ax.stairs(high, borders, baseline=low, fill=True, color="tab:gray", alpha=0.35, label="99 % interval")
            ax.legend(fontsize=8, loc="upper right")
        ax.set_xscale("symlog", linthresh=1e-4, linscale=0.5)
        every = 2 if np.log10(above[-1] / 1e-4) + np.log10(below[-1] / 1e-4) > 7 else 1
        powers = range(-4, int(np.floor(np.log10(max(above[-1], below[-1])))) + 1, every)
        ticks = np.array([-(10.0**p) for p in powers][::-1] + [0.0] + [10.0**p for p in powers])
        ax.set_xticks(ticks[(ticks >= -below[-1]) & (ticks <= above[-1])])
        ax.set_xlim(-1.3 * below[-1], 1.3 * above[-1])
        ax.set_yscale("log")
        # A single eigenvalue is a bar that shows; above the tallest there is room for the text.
        tallest = max(2.0, float(np.max(counts)))
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
        foot = ax.get_xaxis_transform()
        if len(self.eigenvalues):
            ax.vlines(self.eigenvalues, 0, 0.03, color="tab:red", lw=1.5, transform=foot, label="computed eigenvalues")
        if len(self.eigenvalues) and self.by_group is not None:
            found = [self.eigenvalue_estimate(i) for i in range(len(self.eigenvalues))]
            ends = [e.value - e.error for e in found], [e.value + e.error for e in found]
            label = "their 99 % intervals"
            height = 0.035 + 0.02 * np.arange(len(found))
            ax.hlines(height, *ends, color="tab:red", lw=2, alpha=0.5, transform=foot, label=label)
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
