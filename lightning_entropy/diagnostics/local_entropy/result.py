"""What is known of the local entropy around x: its numbers and its picture."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_entropy.diagnostics.estimate import GroupValues
from lightning_entropy.diagnostics.figures import axes_for
from lightning_entropy.diagnostics.local_entropy.flatness import FlatnessProfile, draw_rises, finish_rises

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LocalEntropyResult:
    r"""Local entropy at x, as the smoothed loss u(x) = -T log E exp(-f(y) / T) over y ~ N(x, T / gamma I).

    Args:
        weights: P.
        examples: Examples that the loss was averaged over.
        loss: f(x).
        gamma: Stiffness, loss/weight^2.
        temperature: T, loss.
        gammas: The ladder, from ``gamma`` up to where f is nearly constant.
        rises: u(x, gamma) - f(x) at each rung of the ladder: the value relative to f(x).
        rise_errors: Half-widths of their 99 % intervals: of the chains, quadrature included, and, with groups, of the
            choice of examples.
        gradient: gamma (x - <y>) = grad u, the direction of Entropy-SGD, shape (P,).
        gradient_stderr: Its standard errors from the scatter of the chains, shape (P,).
        gradient_norm: |grad u|, freed of the noise's contribution.
        acceptance: Lowest share of accepted proposals on the ladder; below 0.5 distrust the numbers.
        profile: The flatness profile, if asked for.
        gradient_norm_error: Half-width of its 99 % interval, from leaving chains out; NaN for two.
        chain_errors: ``rise_errors`` of the chains alone.
        groups: Each rise on groups of the examples, to first order; empty without groups.
    """

    weights: int
    examples: int
    loss: float
    gamma: float
    temperature: float
    gammas: np.ndarray
    rises: np.ndarray
    rise_errors: np.ndarray
    gradient: np.ndarray
    gradient_stderr: np.ndarray
    gradient_norm: float
    acceptance: float
    profile: FlatnessProfile | None = None
    gradient_norm_error: float = 0.0
    chain_errors: np.ndarray | None = None
    groups: tuple[GroupValues, ...] = ()

    @property
    def rise(self) -> float:
        """u(x) - f(x) at ``gamma``: small in a wide valley, large in a sharp one."""
        return float(self.rises[0])

    @property
    def rise_error(self) -> float:
        """Half-width of the 99 % interval of ``rise``."""
        return float(self.rise_errors[0])

    @property
    def local_entropy(self) -> float:
        """F(x, gamma) = log of the integral of exp(-(f(y) + gamma/2 |x - y|^2) / T) over y, a pure number."""
        volume = self.weights / 2 * math.log(2 * math.pi * self.temperature / self.gamma)
        return volume - (self.loss + self.rise) / self.temperature

    def scalars(self) -> dict[str, float]:
        """Return the numbers worth a line in a log, by name."""
        numbers = {
            "loss": self.loss,
            "rise": self.rise,
            "rise_error": self.rise_error,
            "gradient_norm": self.gradient_norm,
            "acceptance": self.acceptance,
        }
        if self.profile is not None:
            for sigma, rise in zip(self.profile.sigmas, self.profile.rises, strict=True):
                numbers[f"rise_at_sigma_{sigma:.2g}"] = float(rise)
        return numbers

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the smoothed loss above f(x) against the width of the Gaussian, and the flatness profile with it."""
        ax = axes_for(ax)
        if self.profile is not None:
            self.profile.plot(ax)
        widths = np.sqrt(self.temperature / self.gammas)
        label = f"smoothed loss u (local entropy), T = {self.temperature:.3g}"
        draw_rises(ax, widths, self.rises, self.rise_errors, "s-", "tab:red", label)
        finish_rises(ax)
        if hidden := int((self.rises <= 0).sum()):
            note = f"{hidden} of {len(self.rises)} values of u lie below f(x): not drawn"
            ax.text(0.98, 0.04, note, transform=ax.transAxes, ha="right", fontsize=9, color="tab:red")
        ax.set_xlabel(r"width of the Gaussian around every weight: $\sigma$, or $\sqrt{T/\gamma}$")
        ax.set_title(
            f"Flatness, {self.weights:,} weights: u - f(x) = {self.rise:.2g} ± {self.rise_error:.1g} at "
            rf"$\gamma$ = {self.gamma:g}",
            fontsize=10,
        )
        return ax.figure, ax  # type: ignore[return-value]
