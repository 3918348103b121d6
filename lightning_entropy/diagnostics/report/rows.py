"""The lines of a report's tables: each number with its error bar and how to read it, and the difference of two."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_entropy.diagnostics.estimate import Estimate, GroupValues, student
from lightning_entropy.diagnostics.gradient_noise import GradientNoiseResult
from lightning_entropy.diagnostics.hessian import HessianResult
from lightning_entropy.diagnostics.local_entropy import LocalEntropyResult
from lightning_entropy.diagnostics.report.losses import LossResult
from lightning_entropy.diagnostics.trajectory import TrajectoryResult


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: What it is.
        own: Its value, NaN or infinite if it could not be measured, with the error that is not the choice of examples:
            of random probes or chains.
        meaning: How to read it, and what is typical, in a sentence.
        better: What a smaller value is in a verdict, such as "flatter". None: a difference is no verdict.
        groups: Its value on groups of the examples, whose scatter is the error of their choice. None: not known.
    """

    name: str
    own: Estimate
    meaning: str
    better: str | None = None
    groups: GroupValues | None = None

    @property
    def value(self) -> float:
        """The number."""
        return self.own.value

    @property
    def estimate(self) -> Estimate:
        """The number with all of its error."""
        return self.own if self.groups is None else self.own.widened(self.groups.estimate)

    @property
    def error(self) -> float:
        """Half-width of its 99 % interval; 0 if exact."""
        return self.estimate.error

    def __str__(self) -> str:
        return str(self.estimate)


def difference(first: Row, second: Row) -> Estimate:
    """Return how much larger the second is, group by group where both were measured on the same examples."""
    gap = Estimate(second.value - first.value)
    if first.groups is not None and second.groups is not None and first.groups.pairs(second.groups):
        return gap.widened((second.groups - first.groups).estimate, first.own, second.own)
    return gap.widened(first.estimate, second.estimate)


def smaller(first: Row, second: Row) -> int | None:
    """Return which of two is smaller by more than the 99 % error bar of their difference: 0 or 1, or None."""
    gap = difference(first, second)
    if first.better is None or second.better is None or not abs(gap.value) > gap.error:
        return None
    return int(gap.value < 0)


def _known(value: float, error: float = 0.0) -> Estimate:
    """Return an estimate of which the half-width of the 99 % interval is known."""
    return Estimate(value, error / student(math.inf))


def _loss_rows(r: LossResult) -> list[Row]:
    rows = []
    for name, (split, values) in r.numbers().items():
        found, own = r.splits[split], Estimate(values.estimate.value)
        if name.endswith("%"):
            meaning = f"Of {found.examples:,} examples, those with another class on top; chance is 100 - 100 / classes."
            better = "fewer errors"
            if not values.estimate.stderr:  # none or all: of n that are all alike, 4.6 / n are not, at most, with 99 %
                own = _known(values.estimate.value, 100 * math.log(100) / found.examples)
        else:
            per = "" if found.unit == "example" else "; its error is from the scatter between batches"
            meaning = f"Mean over {found.examples:,} examples{per}. "
            meaning += (
                "Compare flatness at equal loss: a cross entropy that falls takes its curvature along."
                if split == "train"
                else "Higher than the training loss, typically: the gap is what is not generalised."
            )
            better = "lower loss"
        rows.append(Row(name, own, meaning, better, values))
    return rows


def _hessian_rows(r: HessianResult) -> list[Row]:
    low, high = r.near_zero()
    bounds = r.eigenvalue_errors
    ends = [float(bounds[0]), float(bounds[-1])] if len(bounds) else [0.0, 0.0]
    rows = [
        Row(
            "largest eigenvalue",
            _known(r.largest, ends[0]),
            "Sharpness, in loss / weight². Plain gradient descent is stable below 2 / learning rate, and often trains "
            "up to about that.",
            "flatter",
            r.eigenvalue_groups(0),
        ),
        Row(
            "smallest eigenvalue",
            _known(r.smallest, ends[1]),
            "Negative: the loss still curves down in some direction. Typically a few per cent of the largest.",
            groups=r.eigenvalue_groups(-1),
        ),
    ]
    if r.trace is not None:
        meaning = (
            f"Sum of all curvatures, in loss / weight²; divided by {r.weights:,} weights, their mean. Noise of width s "
            "on every weight raises the loss by about s² / 2 times this."
        )
        rows.append(Row("trace", r.trace, meaning, "flatter", r.trace_groups))
    if r.exact or high - low < 0.5:
        meaning = "Nearly flat directions; most of them, typically, in a net that fits its data."
        rows.append(Row("share of |λ| ≤ 1e-4", _known((low + high) / 2, (high - low) / 2), meaning))
    return rows


def _local_entropy_rows(r: LocalEntropyResult) -> list[Row]:
    width = math.sqrt(r.temperature / r.gamma)
    smoothed = (
        f"How far local entropy's smoothed loss lies above f(x), at gamma = {r.gamma:g} and T = {r.temperature:g}, a "
        f"Gaussian of width {width:.2g} on every weight; smaller is a wider valley."
    )
    if r.rise + r.rise_error < 0:
        smoothed += " Negative: the loss falls beside x."
    rows = [
        Row(
            "rise of the smoothed loss",
            _known(r.rise, r.rise_error if r.chain_errors is None else float(r.chain_errors[0])),
            smoothed,
            "flatter" if r.acceptance >= 0.5 and r.rise + r.rise_error >= 0 else None,
            r.groups[0] if r.groups else None,
        ),
        Row(
            "norm of its gradient",
            _known(r.gradient_norm, r.gradient_norm_error),
            "Length of Entropy-SGD's step direction, in loss / weight; 0 at the bottom of the smoothed valley.",
        ),
        Row(
            "accepted proposals, share",
            Estimate(r.acceptance),
            "Of the sampler, on the worst rung: about 0.8 is meant; below 0.5 distrust the two numbers above.",
        ),
    ]
    if r.profile is not None:
        picked = range(0, len(r.profile.sigmas), 2)
        rows += [
            Row(
                f"rise at sigma = {r.profile.sigmas[i]:.2g}",
                r.profile.draws[i],
                "Mean rise of the loss under Gaussian noise of this width on every weight; as sigma² in a quadratic "
                "valley.",
                "flatter",
                r.profile.groups[i] if r.profile.groups else None,
            )
            for i in picked
        ]
    return rows


def _gradient_noise_rows(r: GradientNoiseResult) -> list[Row]:
    scale = r.noise_scale

    def row(name: str, number: str, meaning: str) -> Row:
        return Row(name, Estimate(float(getattr(r, number))), meaning, groups=r.groups(number))

    return [
        row(
            "trace of D",
            "trace",
            "D is the covariance of the gradients of single examples. Loudness: their mean squared distance from their "
            "mean.",
        ),
        row(
            "λ(D), clipped",
            "clipped_mean",
            f"Mean eigenvalue of D as Chaudhari & Soatto count: what lies below λ₁ P ε (the largest, times "
            f"{r.weights:,} weights, times float32's precision) counts as that much. Sd over directions: "
            f"{r.clipped_std:.3g}.",
        ),
        row(
            "rank(D), clipped, %",
            "rank_percent",
            f"Share of directions with noise, as they count: {r.rank} eigenvalues above λ₁ P ε. A few per cent is "
            "typical: the noise is not round.",
        ),
        row("λ(D)", "mean", f"Mean eigenvalue of D: the noise in one direction. Sd over directions: {r.std:.3g}."),
        row(
            "stable rank",
            "stable_rank",
            f"Trace over largest eigenvalue: round noise would have {r.weights:,}, a handful is typical.",
        ),
        row(
            "participation",
            "participation",
            f"tr(D)² / tr(D²): about how many directions share the noise, from 1 to {r.weights:,} (round noise).",
        ),
        Row(
            "noise scale, examples",
            scale,
            "tr(D) / |mean gradient|²: the batch whose noise is as large as its gradient. Much larger batches than "
            "this waste examples, much smaller ones waste steps."
            if math.isfinite(scale.value)
            else "The mean gradient is lost in the noise, as near a minimum: take more examples.",
        ),
    ]


def _trajectory_rows(r: TrajectoryResult) -> list[Row]:
    memory = Row(
        "correlation time, steps",
        Estimate(r.current.correlation_time * r.interval),
        "Of the slowest component: a path must be many times as long to tell anything.",
    )
    if not r.current.conclusive:
        return [Row("p-value of the current", Estimate(math.nan), r.current.verdict), memory]
    return [
        Row(
            "p-value of the current",
            Estimate(r.current.p_value),
            "How likely chance alone turns a path this clearly; below 0.01 SGD walks in circles here.",
        ),
        Row(
            "clearest turn, standard errors",
            Estimate(r.current.significance),
            "Rotation in the plane of two principal components of the path, over its error; 2 to 3 by chance.",
        ),
        Row(
            "the control's",
            Estimate(r.control_current.significance),
            "The same of a reversible process of equal length, which does not turn: what chance makes.",
        ),
        memory,
    ]


ROWS: dict[str, Callable[[Any], list[Row]]] = {
    "loss": _loss_rows,
    "hessian": _hessian_rows,
    "local_entropy": _local_entropy_rows,
    "gradient_noise": _gradient_noise_rows,
    "trajectory": _trajectory_rows,
}
