"""What an outer step asks the replicas for, in numbers."""

import dataclasses
import typing

import numpy as np
import pytest

import lightning_entropy as le
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.methods.targets import OUTER_TARGETS

X, Z = np.array([3.0, 5.0]), np.array([1.0, 7.0])


@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("anchor", [3, 5], {"early": True, "near": True, "common": False}),
        ("average", [1, 7], {"early": False, "near": True, "common": False}),
        ("pseudo_gradient", [2, -2], {"early": False, "near": False, "common": True}),
    ],
)
def test_a_target_is_its_formula_and_three_facts(name: str, value: list[float], facts: dict[str, bool]) -> None:
    target = OUTER_TARGETS[name]
    assert target.of(X, Z).tolist() == value
    assert {fact: getattr(target, fact) for fact in ("early", "near", "common")} == facts
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.early = True  # type: ignore[misc]


@pytest.mark.parametrize("name", OUTER_TARGETS)
def test_a_target_that_may_travel_early_does_not_look_at_z(name: str) -> None:
    target = OUTER_TARGETS[name]
    assert target.early == (target.of(X, Z) is X)


def test_the_names_are_those_that_a_relaxation_takes() -> None:
    hints = typing.get_type_hints(Relaxation)
    assert tuple(OUTER_TARGETS) == typing.get_args(hints["elastic_target"])
    assert [le.Relaxation(elastic_target=name).outer_target for name in OUTER_TARGETS] == list(OUTER_TARGETS.values())
    assert le.parle().outer_target is OUTER_TARGETS["anchor"]
    assert le.diloco().outer_target is OUTER_TARGETS["pseudo_gradient"]
