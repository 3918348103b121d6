"""A number with its error bar."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean of independent samples, with its standard error.

    ``error``, the error bar that results print and plots draw, is the half-width of the two-sided 99 % Student
    interval: it stays honest for a handful of samples, where one or two standard errors would promise too much.

    Args:
        value: The estimate.
        stderr: Its standard error, in the unit of ``value``, >= 0. Zero for what was computed exactly, NaN if unknown.
        dof: Degrees of freedom of the standard error: samples - 1. ``math.inf`` for an exact number.

    Example:
        >>> import torch
        >>> e = Estimate.of(torch.tensor([1.0, 2.0, 3.0]))
        >>> e.value, round(e.stderr, 4), e.dof          # stderr = 1 / sqrt(3)
        (2.0, 0.5774, 2)
        >>> round(e.error / e.stderr, 3)                # Student's t, 2 degrees of freedom, 99 %
        9.925
    """

    value: float
    stderr: float = 0.0
    dof: float = math.inf

    @classmethod
    def of(cls, samples: Tensor) -> "Estimate":
        """Average independent samples, a vector of n >= 2 numbers."""
        value, stderr, dof = mean_and_stderr(samples.double())
        return cls(float(value), float(stderr), dof)

    @property
    def error(self) -> float:
        """Half-width of the 99 % interval, in the unit of ``value``."""
        return self.stderr * student(self.dof) if self.stderr else 0.0

    def widened(self, *others: "Estimate") -> "Estimate":
        """Return this value with the independent errors of ``others`` on top of its own; their values do not count.

        Degrees of freedom by Welch and Satterthwaite.

        Example:
            >>> Estimate(1.0, 3.0, 5).widened(Estimate(9.0, 4.0, 5)).stderr
            5.0
        """
        errors = [e for e in (self, *others) if e.stderr]
        total = sum(e.stderr**2 for e in errors)
        # In shares, lest the fourth power of a small error be zero.
        spread = sum((e.stderr**2 / total) ** 2 / e.dof for e in errors if total and e.dof)
        return Estimate(self.value, math.sqrt(total), 1 / spread if spread else math.inf)

    def covers(self, truth: float) -> bool:
        """Return whether ``truth`` lies within the error bar (and rounding) of the estimate."""
        return abs(self.value - truth) <= self.error + 1e-12 * max(1.0, abs(truth))

    def __str__(self) -> str:
        return plus_minus(self.value, self.error)


@dataclass(frozen=True)
class GroupValues:
    """What a mean over examples is on each of several groups of them, which are independent.

    Two of them on the same groups are subtracted group by group: what is alike in both cancels.

    Args:
        values: Of each group, shape (G,).
        shares: Each group's share of the examples, shape (G,), summing to 1.

    Example:
        >>> a, b = (GroupValues(np.array(v), np.full(3, 1 / 3)) for v in ([1.0, 5.0, 9.0], [1.5, 5.5, 9.5]))
        >>> round(a.estimate.stderr, 3), (b - a).estimate.stderr
        (2.309, 0.0)
    """

    values: np.ndarray
    shares: np.ndarray

    @property
    def estimate(self) -> Estimate:
        """The mean, with the standard error that the groups' scatter gives; NaN for a single group."""
        n, values, shares = len(self.values), np.asarray(self.values, float), np.asarray(self.shares, float)
        mean = float(shares @ values)
        if n < 2:
            return Estimate(mean, math.nan)
        return Estimate(mean, math.sqrt(n / (n - 1) * float(shares**2 @ (values - mean) ** 2)), n - 1)

    def pairs(self, other: "GroupValues") -> bool:
        """Return whether both are on groups of the same sizes."""
        return len(self.values) == len(other.values) and np.allclose(self.shares, other.shares)

    def __sub__(self, other: "GroupValues") -> "GroupValues":
        return GroupValues(self.values - other.values, self.shares)


def plus_minus(value: float, error: float = 0.0) -> str:
    """Write a number of four digits and its error bar of two, 100 and not 1e+02, if those digits can show it.

    NaN and infinity are what an estimator returns for what its data could not tell.

    Example:
        >>> plus_minus(100.41, 99.8), plus_minus(1234567.0), plus_minus(2.0, 1e-7), plus_minus(math.inf)
        ('100.4 ± 100', '1234567', '2', 'not measured')
        >>> plus_minus(1.5, math.nan)
        '1.5 ± unknown'
    """

    def write(number: float, digits: int) -> str:
        short = f"{number:.{digits}g}"
        return f"{number:.0f}" if "e+" in short and abs(number) < 1e7 else short

    if not math.isfinite(value):
        return "not measured"
    if not math.isfinite(error):
        return f"{write(value, 4)} ± unknown"
    return f"{write(value, 4)} ± {write(error, 2)}" if error > 1e-5 * abs(value) else write(value, 4)


def student(dof: float, level: float = 0.99) -> float:
    """Two-sided quantile of Student's t.

    Args:
        dof: Degrees of freedom, > 0.
        level: Probability inside, in (0, 1).

    Returns:
        t, dimensionless: an interval of +- t standard errors holds the truth with probability ``level``.

    Example:
        >>> round(student(math.inf, 0.95), 3)
        1.96
    """
    from scipy.stats import norm, t

    upper = 0.5 + level / 2
    return float(norm.ppf(upper) if math.isinf(dof) else t.ppf(upper, dof))


def mean_and_stderr(samples: Tensor) -> tuple[Tensor, Tensor, int]:
    """Average over the first dimension, with standard errors.

    Args:
        samples: Independent samples along dimension 0, at least 2; any other dimensions.

    Returns:
        Mean and standard error, each of the shape of one sample, and the degrees of freedom.

    Raises:
        ValueError: If there are fewer than two samples.

    Example:
        >>> import torch
        >>> mean_and_stderr(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        (tensor([2., 5.]), tensor([1., 0.]), 1)
    """
    n = len(samples)
    if n < 2:
        raise ValueError(f"samples must be at least 2 for an error bar, got {n}")
    return samples.mean(0), samples.std(0) / math.sqrt(n), n - 1
