"""Numbers that vary with the outer step: callables of t that pickle, print and compare."""

import math
from dataclasses import dataclass
from typing import Literal

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
        if self.start != AUTO and not (not isinstance(self.start, str) and 0 < self.start < math.inf):
            raise ValueError(f"start must be a finite number > 0 or 'auto', got {self.start!r}")
        if not -1 < self.rate < math.inf:
            raise ValueError(f"rate must be a finite number > -1, got {self.rate}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be a finite number > 0 or None, got {self.limit}")

    def __call__(self, t: int) -> float:
        """Return the value at outer step t >= 0."""
        if self.start == AUTO:
            raise ValueError("start='auto' is measured: only gamma can be, within a relaxation")
        return self.grow(float(self.start), t)

    def grow(self, start: float, t: int) -> float:
        """Return start (1 + rate)^t within the limit; infinity where that overflows."""
        if start == 0:
            return 0.0
        log = math.log(start) + t * math.log1p(self.rate)
        value = math.inf if log > 709 else start * (1 + self.rate) ** t
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
        for name in ("gamma", "factor", "steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")

    def __call__(self, t: int) -> float:
        """Return gamma at outer step t >= 0."""
        half_cosine = (1 - math.cos(math.pi * min(t, self.steps) / self.steps)) / 2
        return self.gamma / (1 + (self.factor - 1) * half_cosine) ** 2
