"""Numbers that vary with the outer step: callables of t that pickle, print and compare."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_entropy.methods.validation import POSITIVE, check_integer, check_number

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Scoping:
    """Grow geometrically with the outer step: start (1 + rate)^t, up to ``limit``.

    Entropy-SGD, section 4.3: a small gamma first (a wide view), then a larger one (a narrow one).

    Args:
        start: value at t = 0, > 0; ``"auto"`` (gamma alone) measures it in a first loop without a spring:
            where gamma |x - z| equals the norm of the mean gradient of that loop.
        rate: relative growth per outer step, > -1; negative shrinks.
        limit: the largest value (the smallest where ``rate < 0``); None: no limit.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.

    Example:
        >>> Scoping(0.5, 1.0, limit=3.0)(1), Scoping(0.5, 1.0, limit=3.0)(10)
        (1.0, 3.0)

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, section 4.3.
    """

    start: float | Literal["auto"]
    rate: float
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.start != AUTO:
            check_number("start", self.start, POSITIVE)
        check_number("rate", self.rate, ("a finite number > -1", lambda v: -1 < v < math.inf))
        if self.limit is not None:
            check_number("limit", self.limit, POSITIVE)

    def __call__(self, t: int) -> float:
        """Return the value at outer step t >= 0."""
        if self.start == AUTO:
            raise ValueError("start='auto' is measured: only gamma can be, within a relaxation")
        return self.grow(float(self.start), t)

    def grow(self, start: float, t: int) -> float:
        """Return start (1 + rate)^t within the limit; infinity where that overflows."""
        try:
            value = start * (1 + self.rate) ** t
        except OverflowError:
            value = math.inf
        if self.limit is None:
            return value
        return min(value, self.limit) if self.rate >= 0 else max(value, self.limit)


@dataclass(frozen=True)
class Widening:
    """Lower gamma so that the width gamma^(-1/2) of the perturbation grows along half a cosine.

    width(t) = gamma^(-1/2) (1 + (factor - 1) (1 - cos(pi min(t, steps) / steps)) / 2): LPF-SGD's schedule.

    Args:
        gamma: at t = 0, > 0.
        factor: final width over first width, > 0.
        steps: outer steps until then, int >= 1.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.

    Example:
        >>> Widening(4.0, factor=2.0, steps=10)(0), Widening(4.0, factor=2.0, steps=10)(10)
        (4.0, 1.0)

    References:
        Bisla, Wang and Choromanska, Low-pass filtering SGD, AISTATS 2022, arXiv:2201.08025.
    """

    gamma: float
    factor: float
    steps: int

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, POSITIVE)
        check_number("factor", self.factor, POSITIVE)
        check_integer("steps", self.steps, 1)

    def __call__(self, t: int) -> float:
        """Return gamma at outer step t >= 0."""
        half_cosine = (1 - math.cos(math.pi * min(t, self.steps) / self.steps)) / 2
        return self.gamma / (1 + (self.factor - 1) * half_cosine) ** 2
