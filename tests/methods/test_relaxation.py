"""A method is a value: every number is read and checked with its name, the rule and the value."""

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lightning_entropy as le

NAN, INF = float("nan"), float("inf")


def test_the_default_value_is_the_users_optimizer() -> None:
    settings = le.Relaxation().at(0)
    assert le.Relaxation().inner_steps == 1
    assert dataclasses.asdict(settings) == {
        "gamma": 0, "noise": 0, "average": 1, "rho": 0, "outer_lr": 1, "width": 0, "stiffness": 0,
    }  # fmt: skip


def test_a_number_may_be_a_callable_of_t() -> None:
    relaxation = le.Relaxation(
        gamma=lambda t: t, noise=lambda t: 2 * t, average=lambda t: 1 / (1 + t), rho=lambda t: 3 * t,
        outer_lr=lambda t: 1 + t,
    )  # fmt: skip
    settings = relaxation.at(3)
    assert dataclasses.asdict(settings) == {
        "gamma": 3,
        "noise": 6,
        "average": 0.25,
        "rho": 9,
        "outer_lr": 4,
        "width": 0,
        "stiffness": 0,
    }


def test_numbers_of_other_libraries_are_numbers() -> None:
    settings = le.Relaxation(gamma=np.float32(0.5), noise=Fraction(1, 4), average=lambda t: np.float64(0.5)).at(0)
    assert (settings.gamma, settings.noise, settings.average) == (0.5, 0.25, 0.5)


NOT_NUMBERS = [None, "1", True, 1j, [1.0], torch.ones(2), np.ones(2), np.True_]


BAD_NUMBERS: list[tuple[str, str, list[float]]] = [
    ("gamma", ">= 0", [-1e-9, -INF, INF, NAN]),
    ("noise", ">= 0", [-1, INF, NAN]),
    ("average", r"in \(0, 1\]", [0, -0.1, 1.0001, NAN, INF]),
    ("rho", ">= 0", [-1, INF, NAN]),
    ("outer_lr", "> 0", [0, -1, INF, NAN]),
    ("width", ">= 0", [-1e-9, INF, NAN]),
    ("outer_momentum", r"in \[0, 1\)", [1, -0.1, NAN, INF]),
    ("mixing", r"in \[0, 1\]", [1.1, -0.1, NAN, INF]),
]


@pytest.mark.parametrize(("name", "rule", "values"), BAD_NUMBERS)
def test_a_number_outside_its_range_is_refused(name: str, rule: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be .*{rule}.*, got {value}$"):
            le.Relaxation(**{name: value})


@pytest.mark.parametrize("name", [name for name, _, _ in BAD_NUMBERS])
def test_what_is_not_a_number_is_refused(name: str) -> None:
    for value in NOT_NUMBERS:
        with pytest.raises(TypeError, match=rf"^{name} must be "):
            le.Relaxation(**{name: value})


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), *((v, TypeError) for v in (1.5, 2.0, True, None, "5", NAN))]
)
def test_inner_steps_is_a_positive_int(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^inner_steps must be an int >= 1, got {value!r}$"):
        le.Relaxation(inner_steps=value)


@pytest.mark.parametrize(("name", "least"), [("fragments", 1), ("delay", 0)])
def test_a_count_is_an_int(name: str, least: int) -> None:
    for value, error in ((least - 1, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=rf"^{name} must be an int >= {least}, got {value!r}$"):
            le.Relaxation(elastic_target="pseudo_gradient", inner_steps=4, **{name: value})


@pytest.mark.parametrize("name", ["reset", "reset_momentum", "coupled", "explicit", "perturb"])
def test_a_switch_is_a_bool(name: str) -> None:
    for value in (1, 0, None, "yes"):
        with pytest.raises(TypeError, match=rf"^{name} must be True or False, got {value!r}$"):
            le.Relaxation(**{name: value})


@pytest.mark.parametrize("name", ["elastic_target", "scale"])
def test_a_choice_is_one_of_its_words(name: str) -> None:
    for value in ("nonsense", None, 1, ["anchor"]):
        with pytest.raises(ValueError, match=rf"^{name} must be one of \(.*\), got "):
            le.Relaxation(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupled": True, "explicit": True}, "coupled and explicit exclude each other"),
        ({"scale": "filter"}, "scale='filter' needs perturb=True or a width"),
        ({"elastic_target": "pseudo_gradient", "rho": 0.5}, "rho must be 0 with elastic_target='pseudo_gradient'"),
        *(
            ({option: value}, f"elastic_target must be 'pseudo_gradient' with {option} = {value}, got 'anchor'")
            for option, value in (("fragments", 2), ("delay", 1), ("mixing", 0.5))
        ),
        *(
            ({"elastic_target": "pseudo_gradient", "inner_steps": 4, **options}, message)
            for options, message in (
                ({"delay": 4}, "delay must be below inner_steps = 4, got 4"),
                ({"delay": 1, "average": 0.5}, "average must be 1.0 with delay = 1, got 0.5"),
                ({"mixing": 0.5, "reset": False}, "reset must be True with mixing = 0.5, got False"),
                ({"fragments": 2, "reset_momentum": True}, "reset_momentum must be False with fragments = 2, got True"),
                ({"mixing": 0.5, "gamma": le.Pull(0.5)}, "gamma must be a number with mixing = 0.5, got Pull"),
            )
        ),
        ({"perturb": True}, "gamma must be a finite number > 0 with perturb=True .*, got 0.0"),
        *(
            ({"perturb": True, "gamma": 1.0, **option}, f"{next(iter(option))} has no meaning with perturb=True")
            for option in (
                {"noise": 0.1}, {"average": 0.5}, {"rho": 0.1}, {"reset": False}, {"reset_momentum": True},
                {"coupled": True}, {"explicit": True}, {"elastic_target": "average"}, {"outer_lr": 0.5},
                {"outer_momentum": 0.5},
            )
        ),
        ({"perturb": True, "gamma": 1.0, "width": 0.1}, "gamma and width exclude each other with perturb=True"),
        ({"perturb": True, "gamma": le.Pull(0.5)}, "gamma must be a finite number > 0 with perturb=True"),
        ({"scale": "relative"}, "scale='relative' needs perturb=True or a width"),
        *(
            ({"gamma": le.Pull(0.5), option: value}, "gamma must be a number with coupled, explicit or reset=False")
            for option, value in (("coupled", True), ("explicit", True), ("reset", False))
        ),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        le.Relaxation(**options)


def test_a_pull_is_a_stiffness_and_no_gamma() -> None:
    now = le.Relaxation(inner_steps=20, gamma=le.Pull(lambda t: 0.5 * t)).at(1)
    assert (now.gamma, now.stiffness) == (0.0, le.Pull(0.5).stiffness(0, inner_steps=20))
    assert le.Relaxation(gamma=0.5).at(0).stiffness == 0.0


def test_shares_of_the_training_are_turned_into_outer_steps() -> None:
    late = le.Relaxation(inner_steps=5, width=le.Starting(0.1, at=0.9), gamma=le.Pull(le.Starting(0.5, at=0.5)))
    assert late.share == "gamma"
    at_steps = late.over(1000)  # 200 outer steps
    assert at_steps.width == le.Starting(0.1, at=180)
    assert at_steps.gamma == le.Pull(le.Starting(0.5, at=100))
    assert at_steps.share is None
    assert at_steps.over(7) is at_steps
    with pytest.raises(ValueError, match=r"at=0.9 is a share of a training whose length is not known"):
        late.at(1)


def test_a_straight_line_over_a_share_of_the_training() -> None:
    falling = le.Relaxation(inner_steps=5, outer_lr=le.Warmup(0.2, 0.9, start=0.7))
    assert falling.share == "outer_lr"
    assert falling.over(1000).outer_lr == le.Warmup(0.2, 180, start=0.7)
    assert falling.over(3).outer_lr == le.Warmup(0.2, 1, start=0.7), "at least one outer step"
    assert falling.at(0).outer_lr == 0.7
    with pytest.raises(ValueError, match=r"steps=0.9 is a share of a training whose length is not known"):
        falling.at(1)
    widening = le.Relaxation(perturb=True, gamma=le.Starting(le.Widening(4.0, 2.0, 0.5), at=0.25, before=4.0))
    assert widening.over(100).gamma == le.Starting(le.Widening(4.0, 2.0, 50), at=25, before=4.0)


@pytest.mark.parametrize(
    ("name", "schedule", "end"),
    [
        ("outer_lr", le.Warmup(0.0, 0.9, start=0.7), "0.0"),
        ("outer_lr", le.Starting(le.Warmup(0.0, 5, start=0.5), at=0.5, before=1.0), "0.0"),
        ("outer_lr", le.Starting(0.0, at=0.5, before=1.0), "0.0"),
        ("average", le.Warmup(1.5, 100, start=0.5), "1.5"),
        ("average", le.Scoping(0.5, 0.1, limit=2.0), "2.0"),
        ("average", le.Widening(1.0, 0.5, 10), "4.0"),
        ("share", le.Warmup(1.0, 100, start=0.5), "1.0"),
    ],
)
def test_what_a_schedule_comes_to_is_checked_before_the_training(name: str, schedule: Any, end: str) -> None:
    """And not after weeks of it, where a learning rate arrives at 0."""
    with pytest.raises(
        ValueError, match=rf"^{name} must be .* at every outer step, got {end} in {type(schedule).__name__}"
    ):
        le.Relaxation(gamma=le.Pull(schedule)) if name == "share" else le.Relaxation(**{name: schedule})


def test_what_a_schedule_does_not_take_is_not_checked() -> None:
    """What is before step 0, a start above a limit, a callable of somebody else's."""
    assert le.Relaxation(outer_lr=le.Starting(0.5, at=0)).at(0).outer_lr == 0.5
    assert le.Relaxation(average=le.Scoping(2.0, 0.1, limit=1.0)).at(0).average == 1
    assert le.Relaxation(outer_lr=lambda t: 1 - t).at(0).outer_lr == 1
    assert le.Relaxation(rho=le.Warmup(0.0, 5, start=1.0)).at(5).rho == 0


def test_the_width_of_either_perturbation() -> None:
    """Of a chain it is the argument, and its own number of t; of the heat equation it is gamma^(-1/2)."""
    assert le.Relaxation(width=lambda t: 1 + t).at(3).width == 4
    assert le.Relaxation(width=0.5, gamma=16.0).at(0).width == 0.5
    assert le.heat(gamma=16.0).at(0).width == 0.25
    assert le.heat(width=le.Warmup(0.5, 2)).at(1).width == 0.25
    assert le.Relaxation(width=0.5, scale="filter").has_anchor
    assert not le.heat().has_anchor


@pytest.mark.parametrize(
    ("options", "spring"), [({}, "implicit"), ({"coupled": True}, "coupled"), ({"explicit": True}, "explicit")]
)
def test_the_form_of_the_spring(options: dict[str, bool], spring: str) -> None:
    assert le.Relaxation(**options).spring == spring
