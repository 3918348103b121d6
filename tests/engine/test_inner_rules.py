"""Which rules a relaxation consists of, and that each of them has no say where it has none."""

from typing import Any

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.engine.chain import Chain
from lightning_entropy.engine.inner_rules import inner_rules
from lightning_entropy.engine.perturbation import MeanPerturbation, Perturbation
from lightning_entropy.engine.weights import Weights
from tests.engine.methods_table import METHODS, OPTIMIZERS, perturbs
from tests.engine.training import Net, assert_equal, start, step


def rules_of(relaxation: le.Relaxation) -> list[Any]:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    return inner_rules(relaxation, Weights(optimizer, tied=not relaxation.has_anchor), None, ())


@pytest.mark.parametrize(
    ("relaxation", "kinds"),
    [
        (le.Relaxation(), [Chain]),
        (le.parle(), [Chain]),
        (le.heat(), [MeanPerturbation]),
        (le.heat(3, scale="filter"), [MeanPerturbation]),
        (le.Relaxation(width=0.1), [Perturbation, Chain]),
        (le.Relaxation(width=lambda t: 0.0), [Perturbation, Chain]),  # it may be more later
    ],
)
def test_the_rules_of_a_relaxation_in_the_order_in_which_they_act(relaxation: le.Relaxation, kinds: list[Any]) -> None:
    assert [type(rule) for rule in rules_of(relaxation)] == kinds


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_says_whether_it_acts_before_the_forward_pass(method: str) -> None:
    assert any(rule.perturbs for rule in rules_of(METHODS[method])) == perturbs(METHODS[method])


def test_a_width_of_zero_changes_no_bit() -> None:
    options: dict[str, Any] = {"inner_steps": 3, "gamma": 0.5, "noise": 1e-2, "average": 0.5}
    net, optimizer, loop = start(OPTIMIZERS["sgd_momentum"], le.Relaxation(**options))
    other, other_optimizer, other_loop = start(
        OPTIMIZERS["sgd_momentum"], le.Relaxation(**options, width=lambda t: 0.0)
    )
    for i in range(8):
        step(net, optimizer, i)
        step(other, other_optimizer, i)
        assert_equal([*net.parameters(), *loop.anchor], [*other.parameters(), *other_loop.anchor])
