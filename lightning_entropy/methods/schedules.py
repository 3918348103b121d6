"""Numbers that vary with the outer step: callables of t that pickle, print and compare."""

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from lightning_entropy.methods.validation import NON_NEGATIVE, POSITIVE, Rule, check_integer, check_number


@dataclass(frozen=True)
class Scoping:
    """Grow geometrically with the outer step: start (1 + rate)^t, up to ``limit``.

    Entropy-SGD, section 4.3: a small gamma first (a wide view), then a larger one (a narrow one).

    Args:
        start: value at t = 0, > 0.
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

    start: float
    rate: float
    limit: float | None = None

    def __post_init__(self) -> None:
        check_number("start", self.start, POSITIVE)
        check_number("rate", self.rate, ("a finite number > -1", lambda v: -1 < v < math.inf))
        if self.limit is not None:
            check_number("limit", self.limit, POSITIVE)

    def __call__(self, t: int) -> float:
        """Return the value at outer step t >= 0; infinity where that overflows."""
        try:
            value = float(self.start) * (1 + self.rate) ** t
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
        steps: until then: outer steps, int >= 1, or a share of the training, as :class:`Starting` has it.

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
    steps: int | float

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, POSITIVE)
        check_number("factor", self.factor, POSITIVE)
        _check_length("steps", self.steps, 1)

    def __call__(self, t: int) -> float:
        """Return gamma at outer step t >= 0."""
        half_cosine = (1 - math.cos(math.pi * _done(self.steps, t))) / 2
        return self.gamma / (1 + (self.factor - 1) * half_cosine) ** 2


@dataclass(frozen=True)
class Warmup:
    """Go linearly from ``start`` to ``value`` over the first outer steps, and stay there.

    For any number of a relaxation, such as ``width=Warmup(0.1, 1000)``: noise that is small while the weights still
    move fast. With ``start`` above ``value`` it is a decay: ``outer_lr=Warmup(0.1, 0.9, start=0.7)`` falls over nine
    tenths of the training.

    Args:
        value: from t = ``steps`` on, >= 0.
        steps: until then: outer steps, int >= 1, or a share of the training, as :class:`Starting` has it.
        start: value at t = 0, >= 0.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.

    Example:
        >>> [Warmup(0.4, 2)(t) for t in range(4)]
        [0.0, 0.2, 0.4, 0.4]
    """

    value: float
    steps: int | float
    start: float = 0.0

    def __post_init__(self) -> None:
        check_number("value", self.value, NON_NEGATIVE)
        _check_length("steps", self.steps, 1)
        check_number("start", self.start, NON_NEGATIVE)

    def __call__(self, t: int) -> float:
        """Return the value at outer step t >= 0."""
        done = _done(self.steps, t)
        return self.start * (1 - done) + self.value * done


@dataclass(frozen=True)
class Starting:
    """Turn a number on late: ``before`` until outer step ``at``, then ``value``.

    SAM in the last eighth of a training has nearly the whole effect of SAM; whether that holds for a smoothing or a
    slow outer step can be tried with this. What is "off" depends on the number: 0 for ``gamma``, ``noise``, ``rho`` and
    ``width``, 1 for ``average`` and ``outer_lr``. So ``width=Starting(0.1, at=0.88)``, and
    ``outer_lr=Starting(0.5, at=0.88, before=1.0)``, with which a lookahead is the plain optimizer at first.

    Args:
        value: from outer step ``at`` on: a number, or a schedule that counts its steps from there.
        at: int >= 0, an outer step; or a float in (0, 1), a share of the training, which callbacks and strategies know
            under automatic optimization with a ``max_steps`` or ``max_epochs``. Elsewhere a share is refused.
        before: until then, >= 0.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.

    Example:
        >>> late = Starting(0.1, at=2)
        >>> [late(t) for t in range(4)]
        [0.0, 0.0, 0.1, 0.1]
        >>> in_outer_steps(Starting(0.1, at=0.9), 50).at
        45

    References:
        Zhou, Wang, Mao, Li and Yan, Sharpness-aware minimization efficiently selects flatter minima late in training,
        ICLR 2025, arXiv:2410.10373.
    """

    value: float | Scoping | Widening | Warmup | Callable[[int], float]
    at: int | float
    before: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.value):
            check_number("value", self.value, NON_NEGATIVE)
        _check_length("at", self.at, 0)
        check_number("before", self.before, NON_NEGATIVE)

    def __call__(self, t: int) -> float:
        """Return the value at outer step t >= 0."""
        if t == 0 and isinstance(self.at, float):  # which is before any share
            return self.before
        at = _known("at", self.at)
        if t < at:
            return self.before
        return self.value(t - at) if callable(self.value) else self.value


def check_ends(name: str, value: Any, rule: Rule) -> None:
    """Check between which values a schedule of ours goes: what it will come to, before the training.

    Args:
        name: of the argument.
        value: a number, a schedule, or any other callable, of which nothing is known.
        rule: for all that it takes.

    Raises:
        ValueError: an end of a schedule breaks the rule.

    Example:
        >>> check_ends("outer_lr", Warmup(0.1, 0.9, start=0.7), POSITIVE)
    """
    words, holds = rule
    for end in _ends(value):
        if not holds(end):
            raise ValueError(f"{name} must be {words} at every outer step, got {end} in {value!r}")


def _ends(value: Any) -> tuple[float, ...]:
    match value:
        case Warmup():
            return value.start, value.value
        case Widening():
            return value.gamma, value.gamma / value.factor / value.factor
        case Scoping():
            return (value(0),) if value.limit is None or value.rate == 0 else (value(0), value.limit)
        case Starting():
            later = _ends(value.value) if callable(value.value) else (float(value.value),)
            return (value.before, *later) if value.at else later
    return ()


def in_outer_steps(value: Any, total: float) -> Any:
    """Return a setting in which shares of the training are outer steps; anything else as it is.

    Args:
        value: a number, a schedule, or a schedule of schedules.
        total: outer steps of the training, > 0.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {name: in_outer_steps(getattr(value, name), total) for name in value.__dataclass_fields__}
    if isinstance(value, Starting) and isinstance(value.at, float):
        parts["at"] = round(value.at * total)
    if isinstance(value, Warmup | Widening) and isinstance(value.steps, float):
        parts["steps"] = max(round(value.steps * total), 1)
    changed = {name: part for name, part in parts.items() if part is not getattr(value, name)}
    return replace(value, **changed) if changed else value


def _check_length(name: str, value: Any, least: int) -> None:
    if isinstance(value, float):
        check_number(name, value, (f"outer steps, an int >= {least}, or a share in (0, 1)", lambda v: 0 < v < 1))
    else:
        check_integer(name, value, least)


def _known(name: str, value: int | float) -> int:
    if isinstance(value, float):
        raise ValueError(f"{name}={value} is a share of a training whose length is not known: make it outer steps")
    return value


def _done(steps: int | float, t: int) -> float:
    return min(t, _known("steps", steps)) / steps if t else 0.0  # none of any share
