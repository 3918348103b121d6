"""Saying no with the name, the rule and the value; saying yes with a plain number."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lightning_entropy.methods.validation import NON_NEGATIVE, POSITIVE, check_bool, check_integer, check_number


@pytest.mark.parametrize("value", [0, 0.0, 3, 1e300, np.float32(0.5), np.int64(2), Fraction(1, 4)])
def test_a_number_comes_back_as_a_float(value: Any) -> None:
    checked = check_number("size", value, NON_NEGATIVE)
    assert type(checked) is float
    assert checked == value


@pytest.mark.parametrize(
    ("rule", "words", "bad"),
    [
        (NON_NEGATIVE, "a finite number >= 0", [-1e-300, -math.inf, math.inf, math.nan]),
        (POSITIVE, "a finite number > 0", [0, 0.0, -1, math.inf, math.nan]),
        (("even", lambda v: v % 2 == 0), "even", [1, math.nan]),
    ],
)
def test_a_number_that_breaks_the_rule_is_refused(rule: Any, words: str, bad: list[float]) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=f"^{re.escape(f'size must be {words}, got {value}')}$"):
            check_number("size", value, rule)


@pytest.mark.parametrize("value", [None, "1", True, np.True_, 1j, [1.0], np.ones(2)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'size must be a finite number > 0, got {value!r}')}$"):
        check_number("size", value, POSITIVE)


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_comes_back(value: bool) -> None:
    assert check_bool("switch", value) is value


@pytest.mark.parametrize("value", [0, 1, None, "True", np.True_])
def test_what_is_no_bool_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'switch must be True or False, got {value!r}')}$"):
        check_bool("switch", value)


def test_an_int_at_the_least_comes_back() -> None:
    assert check_integer("count", 3, 3) == 3
    with pytest.raises(ValueError, match=r"^count must be an int >= 3, got 2$"):
        check_integer("count", 2, 3)


@pytest.mark.parametrize("value", [1.0, True, None, "5", np.int64(5)])
def test_what_is_no_int_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'count must be an int >= 1, got {value!r}')}$"):
        check_integer("count", value, 1)
