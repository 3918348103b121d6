"""Each preset is its row of the papers' table."""

import dataclasses
import pickle
from typing import Any

import pytest

import lightning_entropy as le
from tests.engine.methods_table import exported_presets

PRESETS = exported_presets()

# The numbers of the papers, not read from the package; a new preset needs its row.
EXPECTED: dict[str, dict[str, Any]] = {
    "lookahead": {"inner_steps": 5, "outer_lr": 0.5},
    "smoothed_lookahead": {"inner_steps": 20, "outer_lr": 0.6, "width": 0.2, "scale": "relative"},
    "entropy_sgd": {"inner_steps": 20, "gamma": le.Scoping(0.03, 1e-3), "noise": 1e-4, "average": 0.75},
    "hamilton_jacobi": {"inner_steps": 20, "gamma": le.Scoping(0.03, 1e-3)},
    "heat": {"inner_steps": 1, "width": 0.1, "scale": "relative", "perturb": True},
    "two_timescale": {"inner_steps": 1, "gamma": 1.0, "reset": False, "outer_lr": 0.1},
    "elastic_sgd": {"inner_steps": 10, "rho": 0.5},
    "local_sgd": {"inner_steps": 10, "elastic_target": "pseudo_gradient"},
    "diloco": {"inner_steps": 500, "elastic_target": "pseudo_gradient", "outer_lr": 0.7, "outer_momentum": 0.9},
    "streaming_diloco": {
        "inner_steps": 100, "elastic_target": "pseudo_gradient", "outer_lr": 0.7, "outer_momentum": 0.9,
        "fragments": 4, "delay": 4, "mixing": 0.5,
    },
    "snoo": {"inner_steps": 30, "elastic_target": "pseudo_gradient", "outer_lr": 0.7, "outer_momentum": 0.6},
    "palsgd": {
        "inner_steps": 500, "gamma": le.Pull(0.5), "elastic_target": "pseudo_gradient", "outer_lr": 0.7,
        "outer_momentum": 0.9,
    },
    "gpa": {"inner_steps": 1, "elastic_target": "pseudo_gradient", "outer_lr": 1 - 0.9, "outer_momentum": 0.9},
    "parle": {
        "inner_steps": 25, "gamma": le.Scoping(0.01, 1e-3, limit=1.0), "rho": 1.0,
        "average": 0.25,
    },
}  # fmt: skip


def test_every_exported_preset_has_a_row() -> None:
    assert set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_row_of_the_table(name: str) -> None:
    assert PRESETS[name]() == le.Relaxation(**EXPECTED[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_value_pickles_prints_compares_and_does_not_change(name: str) -> None:
    relaxation = PRESETS[name]()
    assert pickle.loads(pickle.dumps(relaxation)) == relaxation
    assert hash(relaxation) == hash(PRESETS[name]())
    assert eval(repr(relaxation), vars(le)) == relaxation
    with pytest.raises(dataclasses.FrozenInstanceError):
        relaxation.gamma = 2.0  # type: ignore[misc]


def test_a_preset_hands_on_every_argument() -> None:
    options = {"coupled": True, "reset_momentum": True, "outer_lr": 0.3, "outer_momentum": 0.4}
    assert le.entropy_sgd(3, 0.5, 0.1, 0.2, **options) == le.Relaxation(
        inner_steps=3, gamma=0.5, noise=0.1, average=0.2, **options
    )
    assert le.hamilton_jacobi(3, 0.5, **options) == le.Relaxation(inner_steps=3, gamma=0.5, **options)
    assert le.heat(3, 0.5, scale="filter") == le.Relaxation(inner_steps=3, gamma=0.5, perturb=True, scale="filter")
    assert le.heat(3, width=0.5, scale="relative") == le.Relaxation(
        inner_steps=3, width=0.5, perturb=True, scale="relative"
    )
    assert le.smoothed_lookahead(3, 0.5, 0.2, scale="filter") == le.Relaxation(
        inner_steps=3, outer_lr=0.5, width=0.2, scale="filter"
    )
    assert le.snoo(3, 0.5, 0.1) == le.diloco(3, 0.5, 0.1)
    assert le.palsgd(3, 0.5, 0.4, 0.1) == le.Relaxation(
        inner_steps=3, gamma=0.5, outer_lr=0.4, outer_momentum=0.1, elastic_target="pseudo_gradient"
    )
    assert le.gpa(0.75) == le.diloco(1, 0.25, 0.75)
    assert le.two_timescale(0.5, 0.1, 0.2) == le.Relaxation(gamma=0.5, noise=0.1, outer_lr=0.2, reset=False)
    assert le.diloco(3, 0.5, 0.1) == le.Relaxation(
        inner_steps=3, outer_lr=0.5, outer_momentum=0.1, elastic_target="pseudo_gradient"
    )
    assert le.streaming_diloco(3, 2, 1, 0.1, outer_lr=0.5, outer_momentum=0.2) == le.Relaxation(
        inner_steps=3, fragments=2, delay=1, mixing=0.1, outer_lr=0.5, outer_momentum=0.2,
        elastic_target="pseudo_gradient",
    )  # fmt: skip
    assert le.parle(
        3, 0.5, 0.1, 0.2, elastic_target="average", coupled=True, outer_lr=0.3, outer_momentum=0.4
    ) == le.Relaxation(
        inner_steps=3, gamma=0.5, rho=0.1, average=0.2, elastic_target="average", coupled=True, outer_lr=0.3,
        outer_momentum=0.4,
    )  # fmt: skip


def test_the_unit_of_heat_follows_the_number() -> None:
    """A width is a share of a filter's norm, a gamma the heat equation's; whoever names a unit has it."""
    relative = le.Relaxation(width=0.1, perturb=True, scale="relative")
    assert le.heat() == le.heat(width=0.1) == le.heat(scale="relative") == relative
    assert le.heat(gamma=4.0) == le.Relaxation(gamma=4.0, perturb=True)
    assert le.heat(gamma=4.0, scale="relative") == le.Relaxation(gamma=4.0, perturb=True, scale="relative")
    assert le.heat(width=0.5, scale="absolute") == le.Relaxation(width=0.5, perturb=True)
    assert le.heat(scale="absolute") == le.Relaxation(gamma=1e4, perturb=True)
    assert le.heat(scale="filter") == le.Relaxation(gamma=1e4, perturb=True, scale="filter")
    assert le.HeatSmoothing().relaxation == relative


def test_heat_takes_gamma_or_width() -> None:
    with pytest.raises(ValueError, match=r"gamma and width exclude each other: .*, got 10000.0 and 0.1"):
        le.heat(gamma=1e4, width=0.1)


@pytest.mark.parametrize("averaging", [1.0, -0.1, float("nan")])
def test_averaging_is_a_share(averaging: float) -> None:
    with pytest.raises(ValueError, match=r"averaging must be in \[0, 1\), got "):
        le.gpa(averaging)
