"""Schedules against the papers' formulas."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lightning_entropy as le

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("t", [0, 1, 7, 3900])
def test_scoping_is_the_papers_power(t: int) -> None:
    assert le.Scoping(0.03, 1e-3)(t) == pytest.approx(0.03 * 1.001**t, rel=1e-12)


def test_scoping_ends_where_the_paper_ended() -> None:
    assert le.Scoping(0.03, 1e-3)(3900) == pytest.approx(1.48, rel=1e-2)


def test_scoping_stops_at_its_limit_from_either_side() -> None:
    assert le.Scoping(0.01, 1.0, limit=1.0)(1_000_000) == 1.0
    assert le.Scoping(1.0, -0.5, limit=0.125)(2) == 0.25
    assert le.Scoping(1.0, -0.5, limit=0.125)(1_000_000) == 0.125


def test_scoping_overflows_to_infinity_which_gamma_refuses() -> None:
    scoping = le.Scoping(1e-200, 1.0)
    assert scoping(10_000) == math.inf
    assert le.Scoping(1e-200, 1.0, limit=3.0)(10_000) == 3.0
    with pytest.raises(ValueError, match=r"gamma\(t=10000\) must be a finite number >= 0, got inf"):
        le.Relaxation(gamma=scoping).at(10_000)


def test_widening_goes_from_width_to_width_along_half_a_cosine() -> None:
    widening = le.Widening(4.0, factor=3.0, steps=10)
    widths = [widening(t) ** -0.5 for t in range(13)]
    assert widths[0] == pytest.approx(0.5)
    assert widths[5] == pytest.approx(1.0)  # half way
    assert widths[10:] == pytest.approx([1.5, 1.5, 1.5])
    assert widths == sorted(widths)


def test_a_warmup_is_a_straight_line_and_then_level() -> None:
    assert [le.Warmup(1.0, 4)(t) for t in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [le.Warmup(0.0, 2, start=1.0)(t) for t in range(4)] == [1.0, 0.5, 0.0, 0.0]


def test_a_late_start_counts_its_schedule_from_there() -> None:
    late = le.Starting(le.Warmup(1.0, 2), at=3, before=0.5)
    assert [late(t) for t in range(7)] == [0.5, 0.5, 0.5, 0.0, 0.5, 1.0, 1.0]
    assert [le.Starting(0.5, at=0)(t) for t in range(2)] == [0.5, 0.5]


def test_a_start_of_another_library_is_grown_in_full_precision() -> None:
    start = np.float32(0.1)
    assert float(le.Scoping(start, 0.1)(3)) == float(start) * 1.1**3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "schedule",
    [
        le.Scoping(0.5, 0.1, limit=2.0), le.Widening(4, 2, 10), le.Warmup(0.1, 5, start=1),
        le.Starting(le.Warmup(0.1, 5), at=0.5), le.Warmup(0.2, 0.9, start=0.7), le.Pull(0.5),
        le.Pull(le.Warmup(0.5, 3)),
    ],
)  # fmt: skip
def test_schedules_pickle_print_and_compare(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(le)) == schedule


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((lambda v=v: le.Scoping(v, 0.1), "start") for v in (0, -1, NAN, INF, None, "auto", True)),
        *((lambda v=v: le.Scoping(1.0, v), "rate") for v in (-1, -2, NAN, INF, None, "big", True)),
        *((lambda v=v: le.Scoping(1.0, 0.1, v), "limit") for v in (0, -1, NAN, INF, "big", True)),
        *((lambda v=v: le.Widening(v, 2.0, 10), "gamma") for v in (0, -1, NAN, INF, None, "auto", True)),
        *((lambda v=v: le.Widening(1.0, v, 10), "factor") for v in (0, -1, NAN, INF, None, True)),
        *((lambda v=v: le.Widening(1.0, 2.0, v), "steps") for v in (0, -1, 0.0, 1.0, NAN, 1.5, None, True)),
        *((lambda v=v: le.Warmup(v, 2), "value") for v in (-1, NAN, INF, None, "auto", True)),
        *((lambda v=v: le.Warmup(1.0, v), "steps") for v in (0, -1, 0.0, 1.0, NAN, 1.5, None, True)),
        *((lambda v=v: le.Warmup(1.0, 2, start=v), "start") for v in (-1, NAN, INF, None, True)),
        *((lambda v=v: le.Starting(v, at=2), "value") for v in (-1, NAN, INF, None, "auto", True)),
        *((lambda v=v: le.Starting(1.0, at=v), "at") for v in (-1, 0.0, 1.0, 1.5, NAN, None, True)),
        *((lambda v=v: le.Starting(1.0, at=2, before=v), "before") for v in (-1, NAN, INF, None, True)),
    ],
)
def test_schedules_refuse_nonsense(make: Callable[[], Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*, got "):
        make()
