"""What is known of the noise of SGD: the eigenvalues of the diffusion matrix and their picture."""

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
        left_out: The same without each of several groups of examples, whose noise scale is NaN; empty without groups.
    """

    weights: int
    examples: int
    loss: float
    eigenvalues: np.ndarray
    gradient_squared: float
    noise_scale: Estimate
    lr: float | None = None
    batch_size: int | None = None
    left_out: "tuple[GradientNoiseResult, ...]" = ()

    def groups(self, name: str) -> GroupValues | None:
        """Return the jackknife's pseudo-values of a number of this result, such as "stable_rank"; None without groups.

        Args:
            name: Of an attribute that is a number.

        Returns:
            G v - (G - 1) v_g for each group g, where v_g is the number without it: their scatter is its error.
        """
        n = len(self.left_out)
        if n < 2:
            return None
        values = np.array([getattr(other, name) for other in self.left_out])
        return GroupValues(n * getattr(self, name) - (n - 1) * values, np.full(n, 1 / n))

    def estimate(self, name: str) -> Estimate:
        """Return a number of this result with the error of the choice of examples, if there are groups."""
        value, groups = Estimate(float(getattr(self, name))), self.groups(name)
        return value if groups is None else value.widened(groups.estimate)

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
        """Return the numbers worth a line in a log, by name."""
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

    def _short(self, name: str) -> str:
        found = self.estimate(name)
        return f"{found.value:.3g} ± {found.error:.2g}" if found.error else f"{found.value:.3g}"

    def _eigenvalue_errors(self) -> np.ndarray:
        """Half-widths of the 99 % intervals of as many eigenvalues as every one of the left out has."""
        n = len(self.left_out)
        length = min(len(other.eigenvalues) for other in self.left_out)
        values = np.array([other.eigenvalues[:length] for other in self.left_out])
        return np.asarray(np.sqrt((n - 1) * values.var(0)) * student(n - 1))

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the eigenvalues against their rank, both logarithmic, with the talk's threshold and round noise."""
        ax = axes_for(ax)
        # Beside the largest, less than this is rounding error.
        positive = self.eigenvalues[self.eigenvalues > 1e-6 * self.eigenvalues[0]]
        index = np.arange(1, len(positive) + 1)
        ax.loglog(index, positive, ".", ms=4, color="tab:blue", label=f"eigenvalues of D, {self.examples:,} examples")
        if self.left_out:
            error = self._eigenvalue_errors()[: len(positive)]
            those = positive[: len(error)]
            low, high = np.maximum(those - error, 0.02 * those), those + error
            ax.fill_between(index[: len(error)], low, high, color="tab:blue", alpha=0.2, lw=0, label="99 % interval")
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
            f"stable rank {self._short('stable_rank')}, participation {self._short('participation')} directions",
            f"noise scale {self.noise_scale} examples"
            if math.isfinite(self.noise_scale.value)
            else "noise scale: mean gradient lost in the noise",
        ]
        ax.text(0.02, 0.03, "\n".join(lines), transform=ax.transAxes, fontsize=8)
        ax.legend(loc="upper right", fontsize=8)
        ax.set_title(f"Gradient noise, {self.weights:,} weights", fontsize=10)
        return ax.figure, ax  # type: ignore[return-value]
