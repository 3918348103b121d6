"""The lines of a report's tables: each number with its error bar and what it tells."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_entropy.diagnostics.estimate import plus_minus
from lightning_entropy.diagnostics.gradient_noise import GradientNoiseResult
from lightning_entropy.diagnostics.hessian import HessianResult
from lightning_entropy.diagnostics.local_entropy import LocalEntropyResult
from lightning_entropy.diagnostics.trajectory import TrajectoryResult


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: What it is.
        value: Its value; NaN or infinite if it could not be measured.
        error: Half-width of its 99 % interval; 0 if exact.
        meaning: What it tells, in a few words.
        flatter: Whether smaller is flatter (True), or it says nothing about flatness (None).
    """

    name: str
    value: float
    error: float
    meaning: str
    flatter: bool | None = None

    def __str__(self) -> str:
        return plus_minus(self.value, self.error)


def _hessian_rows(r: HessianResult) -> list[Row]:
    low, high = r.near_zero()
    sharpest = float(r.eigenvalue_errors[0]) if len(r.eigenvalue_errors) else 0.0
    rows = [
        Row("loss", r.loss, 0.0, f"over {r.examples:,} examples"),
        Row("largest eigenvalue", r.largest, sharpest, "sharpness, loss / weight²", flatter=True),
        Row("smallest eigenvalue", r.smallest, 0.0, "negative: a direction in which the loss curves down"),
    ]
    if r.trace is not None:
        rows.append(Row("trace", r.trace.value, r.trace.error, "sum of all curvatures, loss / weight²", flatter=True))
    if r.exact or high - low < 0.5:
        rows.append(Row("share of |λ| ≤ 1e-4", (low + high) / 2, (high - low) / 2, "nearly flat directions"))
    return rows


def _local_entropy_rows(r: LocalEntropyResult) -> list[Row]:
    width = math.sqrt(r.temperature / r.gamma)
    smoothed = f"above f(x), for gamma = {r.gamma:g}, T = {r.temperature:g}, Gaussian width {width:.2g}"
    if r.rise + r.rise_error < 0:
        smoothed += "; negative: the loss falls beside x"
    rows = [
        Row("rise of the smoothed loss", r.rise, r.rise_error, smoothed, flatter=True if r.acceptance >= 0.5 else None),
        Row("norm of its gradient", r.gradient_norm, 0.0, "Entropy-SGD's direction, loss / weight; 0 at the bottom"),
        Row("accepted proposals, share", r.acceptance, 0.0, "below 0.5 distrust the two numbers above"),
    ]
    if r.profile is not None:
        picked = range(0, len(r.profile.sigmas), 2)
        rows += [
            Row(
                f"rise at sigma = {r.profile.sigmas[i]:.2g}",
                float(r.profile.rises[i]),
                float(r.profile.errors[i]),
                "mean, under Gaussian noise on every weight",
                flatter=True,
            )
            for i in picked
        ]
    return rows


def _gradient_noise_rows(r: GradientNoiseResult) -> list[Row]:
    scale = r.noise_scale
    return [
        Row("trace of D", r.trace, 0.0, "loudness: mean squared deviation of a gradient"),
        Row("λ(D), clipped", r.clipped_mean, 0.0, f"Chaudhari & Soatto's, ± {r.clipped_std:.3g} over directions"),
        Row("rank(D), clipped, %", r.rank_percent, 0.0, f"theirs: {r.rank} eigenvalues above λ₁ P ε"),
        Row("λ(D)", r.mean, 0.0, f"mean eigenvalue, ± {r.std:.3g} over directions"),
        Row("stable rank", r.stable_rank, 0.0, f"trace over largest; round noise would have {r.weights:,}"),
        Row("participation", r.participation, 0.0, "directions that share the noise"),
        Row(
            "noise scale, examples",
            scale.value,
            scale.error,
            "larger batches than this waste examples"
            if math.isfinite(scale.value)
            else "the mean gradient is lost in the noise: take more examples",
        ),
    ]


def _trajectory_rows(r: TrajectoryResult) -> list[Row]:
    memory = Row("correlation time, steps", r.current.correlation_time * r.interval, 0.0, "of the slowest component")
    if not r.current.conclusive:
        return [Row("p-value of the current", math.nan, 0.0, r.current.verdict), memory]
    return [
        Row("p-value of the current", r.current.p_value, 0.0, "of a turn this clear by chance"),
        Row("clearest turn, standard errors", r.current.significance, 0.0, "in the planes of the components"),
        Row("the control's", r.control_current.significance, 0.0, "a reversible process of equal length"),
        memory,
    ]


ROWS: dict[str, Callable[[Any], list[Row]]] = {
    "hessian": _hessian_rows,
    "local_entropy": _local_entropy_rows,
    "gradient_noise": _gradient_noise_rows,
    "trajectory": _trajectory_rows,
}
