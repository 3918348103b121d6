"""A method is a value: presets, schedules, and every bad input refused with its name, the rule and the value."""

import dataclasses
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lightning_entropy as le

PRESETS: dict[str, Callable[..., le.Relaxation]] = {
    name: getattr(le, name)
    for name in (
        "lookahead", "entropy_sgd", "hamilton_jacobi", "heat", "two_timescale", "elastic_sgd", "local_sgd", "diloco",
        "parle",
    )
}  # fmt: skip

# The numbers of design and papers, not read from the package.
EXPECTED: dict[str, dict[str, Any]] = {
    "lookahead": {"inner_steps": 5, "outer_lr": 0.5},
    "entropy_sgd": {"inner_steps": 20, "gamma": le.Scoping(0.03, 1e-3), "noise": 1e-4, "average": 0.75},
    "hamilton_jacobi": {"inner_steps": 20, "gamma": le.Scoping(0.03, 1e-3)},
    "heat": {"inner_steps": 1, "gamma": 1e4, "perturb": True},
    "two_timescale": {"inner_steps": 1, "gamma": 1.0, "reset": False, "outer_lr": 0.1},
    "elastic_sgd": {"inner_steps": 10, "rho": 0.5},
    "local_sgd": {"inner_steps": 10, "elastic_target": "pseudo_gradient"},
    "diloco": {"inner_steps": 500, "elastic_target": "pseudo_gradient", "outer_lr": 0.7, "outer_momentum": 0.9},
    "parle": {
        "inner_steps": 25, "gamma": le.Scoping(0.01, 1e-3, limit=1.0), "rho": 1.0,
        "average": 0.25,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_row_of_the_table(name: str) -> None:
    assert PRESETS[name]() == le.Relaxation(**EXPECTED[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_value_pickles_prints_compares_and_does_not_change(name: str) -> None:
    relaxation = PRESETS[name]()
    assert pickle.loads(pickle.dumps(relaxation)) == relaxation
    assert hash(relaxation) == hash(PRESETS[name]())
    assert eval(repr(relaxation), {"Relaxation": le.Relaxation, "Scoping": le.Scoping}) == relaxation
    with pytest.raises(dataclasses.FrozenInstanceError):
        relaxation.gamma = 2.0  # type: ignore[misc]


def test_the_default_value_is_the_users_optimizer() -> None:
    settings = le.Relaxation().at(0)
    assert le.Relaxation().inner_steps == 1
    assert dataclasses.asdict(settings) == {"gamma": 0, "noise": 0, "average": 1, "rho": 0, "outer_lr": 1, "width": 0}


def test_a_preset_hands_on_every_argument() -> None:
    options = {"coupled": True, "reset_momentum": True, "outer_lr": 0.3, "outer_momentum": 0.4}
    assert le.entropy_sgd(3, 0.5, 0.1, 0.2, **options) == le.Relaxation(
        inner_steps=3, gamma=0.5, noise=0.1, average=0.2, **options
    )
    assert le.hamilton_jacobi(3, 0.5, **options) == le.Relaxation(inner_steps=3, gamma=0.5, **options)
    assert le.heat(3, 0.5, scale="filter") == le.Relaxation(inner_steps=3, gamma=0.5, perturb=True, scale="filter")
    assert le.two_timescale(0.5, 0.1, 0.2) == le.Relaxation(gamma=0.5, noise=0.1, outer_lr=0.2, reset=False)
    assert le.diloco(3, 0.5, 0.1) == le.Relaxation(
        inner_steps=3, outer_lr=0.5, outer_momentum=0.1, elastic_target="pseudo_gradient"
    )
    assert le.parle(
        3, 0.5, 0.1, 0.2, elastic_target="average", coupled=True, outer_lr=0.3, outer_momentum=0.4
    ) == le.Relaxation(
        inner_steps=3, gamma=0.5, rho=0.1, average=0.2, elastic_target="average", coupled=True, outer_lr=0.3,
        outer_momentum=0.4,
    )  # fmt: skip


# Schedules


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


@pytest.mark.parametrize("schedule", [le.Scoping(0.5, 0.1, limit=2.0), le.Scoping("auto", 0.1), le.Widening(4, 2, 10)])
def test_schedules_pickle_print_and_compare(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(le)) == schedule


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
    }


def test_numbers_of_other_libraries_are_numbers() -> None:
    settings = le.Relaxation(gamma=np.float32(0.5), noise=Fraction(1, 4), average=lambda t: np.float64(0.5)).at(0)
    assert (settings.gamma, settings.noise, settings.average) == (0.5, 0.25, 0.5)


def test_auto_gamma_is_zero_until_measured_and_then_grows() -> None:
    relaxation = le.Relaxation(gamma=le.Scoping("auto", 0.5, limit=4.0))
    assert relaxation.auto_gamma
    assert relaxation.at(0).gamma == 0
    assert [relaxation.at(t, gamma_start=1.0).gamma for t in (1, 2, 3, 99)] == [1.0, 1.5, 2.25, 4.0]
    assert le.Relaxation(gamma="auto").at(3, gamma_start=2.0) == le.Relaxation(gamma=2.0 * 1.001**2).at(0)
    assert not le.Relaxation(gamma=0.5).auto_gamma


# Bad input

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = [None, "1", True, 1j, [1.0], torch.ones(2), np.ones(2), np.True_]
BAD_NUMBERS: list[tuple[str, str, list[float]]] = [
    ("gamma", ">= 0", [-1e-9, -INF, INF, NAN]),
    ("noise", ">= 0", [-1, INF, NAN]),
    ("average", r"in \(0, 1\]", [0, -0.1, 1.0001, NAN, INF]),
    ("rho", ">= 0", [-1, INF, NAN]),
    ("outer_lr", "> 0", [0, -1, INF, NAN]),
    ("outer_momentum", r"in \[0, 1\)", [1, -0.1, NAN, INF]),
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
        ({"scale": "filter"}, "scale='filter' needs perturb=True"),
        ({"elastic_target": "pseudo_gradient", "rho": 0.5}, "rho must be 0 with elastic_target='pseudo_gradient'"),
        ({"perturb": True}, "gamma must be a finite number > 0 with perturb=True .*, got 0.0"),
        *(
            ({"perturb": True, "gamma": 1.0, **option}, f"{next(iter(option))} has no meaning with perturb=True")
            for option in (
                {"noise": 0.1}, {"average": 0.5}, {"rho": 0.1}, {"reset": False}, {"reset_momentum": True},
                {"coupled": True}, {"explicit": True}, {"elastic_target": "average"}, {"outer_lr": 0.5},
                {"outer_momentum": 0.5},
            )
        ),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        le.Relaxation(**options)


def test_heat_cannot_measure_gamma() -> None:
    for gamma in ("auto", le.Scoping("auto", 0.1)):
        with pytest.raises((TypeError, ValueError), match=r"gamma|start"):
            le.heat(gamma=gamma)


def test_only_gamma_can_be_measured() -> None:
    with pytest.raises(ValueError, match="only gamma"):
        le.Relaxation(rho=le.Scoping("auto", 0.1))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((lambda v=v: le.Scoping(v, 0.1), "start") for v in (0, -1, NAN, INF, None, "big", True)),
        *((lambda v=v: le.Scoping(1.0, v), "rate") for v in (-1, -2, NAN, INF, None, "big", True)),
        *((lambda v=v: le.Scoping(1.0, 0.1, v), "limit") for v in (0, -1, NAN, INF, "big", True)),
        *((lambda v=v: le.Widening(v, 2.0, 10), "gamma") for v in (0, -1, NAN, INF, None, "auto", True)),
        *((lambda v=v: le.Widening(1.0, v, 10), "factor") for v in (0, -1, NAN, INF, None, True)),
        *((lambda v=v: le.Widening(1.0, 2.0, v), "steps") for v in (0, -1, NAN, 1.5, None, True)),
    ],
)
def test_schedules_refuse_nonsense(make: Callable[[], Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*, got "):
        make()


def test_relax_refuses_nonsense() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
        le.relax("sgd", le.lookahead())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="relaxation must be a Relaxation, got str"):
        le.relax(optimizer, "lookahead")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"outer must return a torch\.optim\.Optimizer.*, got list"):
        le.relax(optimizer, le.lookahead(), outer=lambda params: params)  # type: ignore[arg-type, return-value]
    for seed, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError), ("0", TypeError)):
        with pytest.raises(error, match=f"seed must be an int >= 0, got {seed!r}"):
            le.relax(optimizer, le.lookahead(), seed=seed)  # type: ignore[arg-type]
    lbfgs = torch.optim.LBFGS([w])
    with pytest.raises(ValueError, match="coupled must be False with LBFGS"):
        le.relax(lbfgs, le.entropy_sgd(coupled=True))
    with pytest.raises(ValueError, match="inner_steps must be 1 for the heat variant with LBFGS, got 2"):
        le.relax(lbfgs, le.heat(inner_steps=2))
    with pytest.raises(ValueError, match="outer has no meaning with perturb=True"):
        le.relax(optimizer, le.heat(), outer=torch.optim.Adam)
    with pytest.raises(ValueError, match="replica_mean has no meaning with perturb=True"):
        le.relax(optimizer, le.heat(), replica_mean=lambda tensors: tensors)
    # Every refusal left the optimizer alone.
    assert not optimizer._optimizer_step_pre_hooks
    assert not lbfgs._optimizer_step_pre_hooks
    le.relax(optimizer, le.lookahead()).detach()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad)


def test_a_spring_needs_a_learning_rate() -> None:
    optimizer = NoRate([torch.nn.Parameter(torch.ones(2))])
    for relaxation in (le.hamilton_jacobi(), le.Relaxation(noise=0.1)):
        with pytest.raises(ValueError, match="optimizer must have an 'lr' in every param group"):
            le.relax(optimizer, relaxation)
    le.relax(optimizer, le.lookahead())


@pytest.mark.parametrize("bad", [-1.0, NAN, INF, None, "x", True])
@pytest.mark.parametrize("name", ["gamma", "noise", "average", "rho", "outer_lr"])
def test_a_schedule_that_turns_bad_stops_before_any_weight_changed(name: str, bad: Any) -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    loop = le.relax(optimizer, le.Relaxation(inner_steps=2, **{name: lambda t: 0.5 if t < 2 else bad}))
    for _ in range(4):
        w.grad = torch.ones(2)
        optimizer.step()
    before, momentum = w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()
    for _ in range(2):  # every time anew
        with pytest.raises((ValueError, TypeError), match=rf"^{name}\(t=2\) must be .*, got {bad!r}$"):
            optimizer.step()
    assert torch.equal(w, before)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], momentum)
    assert (loop.outer_step, loop.inner_step) == (2, 0)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_a_heat_schedule_that_turns_bad_leaves_x(bad: float) -> None:
    """y of step t is drawn when step t - 1 ends, so there it is met: with step t - 1 done and x in the parameters."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    loop = le.relax(optimizer, le.heat(gamma=lambda t: 1e4 if t < 1 else bad))
    loop.begin()
    w.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^gamma\(t=1\) must be a finite number > 0 .*, got {bad}$"):
            optimizer.step()
    assert torch.equal(w, torch.tensor([0.5, 1.5]))
