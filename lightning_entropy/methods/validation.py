"""Saying no early: the name, the rule and the value."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

Rule = tuple[str, Callable[[float], bool]]  # in words, and as a test

NON_NEGATIVE: Rule = ("a finite number >= 0", lambda v: 0 <= v < math.inf)
POSITIVE: Rule = ("a finite number > 0", lambda v: 0 < v < math.inf)


def check_number(name: str, value: Any, rule: Rule) -> float:
    """Return ``value`` as a float if it keeps the rule.

    Args:
        name: of the argument.
        value: to be checked.
        rule: which NaN breaks.

    Raises:
        TypeError: not a real number (a bool, a string, a tensor is none).
        ValueError: a number that breaks the rule.
    """
    words, holds = rule
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {words}, got {value!r}")
    if not holds(float(value)):
        raise ValueError(f"{name} must be {words}, got {value}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False.

    Args:
        name: of the argument.
        value: to be checked.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_integer(name: str, value: Any, least: int) -> int:
    """Return ``value`` if it is an int >= ``least``.

    Args:
        name: of the argument.
        value: to be checked.
        least: the smallest allowed.

    Raises:
        TypeError: not an int (a bool is none).
        ValueError: less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value}")
    return value
