"""What is said of an argument that there is not."""

import re
from collections.abc import Callable
from typing import Any

import pytest

import lightning_entropy as le
from lightning_entropy.methods.arguments import MEANT
from lightning_entropy.strategies import ElasticEntropyFabricStrategy

HAS_NO = "ElasticEntropyStrategy has no argument"
SAID: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "EntropySGD has no argument 'L': it is inner_steps here": (le.EntropySGD, {"L": 20}),
    "entropy_sgd has no argument 'alpha': it is average here": (le.entropy_sgd, {"alpha": 0.75}),
    "lookahead has no argument 'alpha': it is outer_lr here": (le.lookahead, {"alpha": 0.5}),
    "diloco has no argument 'H': it is inner_steps here": (le.diloco, {"H": 30}),
    "HeatSmoothing has no argument 'sigma': it is width here": (le.HeatSmoothing, {"sigma": 0.1}),
    "HamiltonJacobi has no argument 'gama': did you mean gamma?": (le.HamiltonJacobi, {"gama": 1.0}),
    "Relaxation has no argument 'scope': it is gamma here": (le.Relaxation, {"inner_steps": 20, "scope": 1.0}),
    "lookahead has no argument 'colour': it takes inner_steps, outer_lr": (le.lookahead, {"colour": "red"}),
    "InnerOuterCallback has no argument 'sed': did you mean seed?": (
        le.InnerOuterCallback,
        {"relaxation": le.parle(), "sed": 1},
    ),
    f"{HAS_NO} 'replica': did you mean replicas?": (
        le.ElasticEntropyStrategy,
        {"replica": 2},
    ),
    f"{HAS_NO} 'L': write ElasticEntropyStrategy(parle(inner_steps=...)) or another method's": (
        le.ElasticEntropyStrategy,
        {"L": 25},
    ),
    f"{HAS_NO} 'gamma': write ElasticEntropyStrategy(parle(gamma=...)) or another method's": (
        le.ElasticEntropyStrategy,
        {"gamma": 1.0},
    ),
    "diloco has no argument 'lr': it is your optimizer's": (le.diloco, {"lr": 1.0}),
    "ElasticEntropyFabricStrategy has no argument 'bucket_cap': did you mean bucket_cap_mb?": (
        ElasticEntropyFabricStrategy,
        {"bucket_cap": 25},
    ),
}


@pytest.mark.parametrize("message", SAID)
def test_it_is_said_what_is_meant(message: str) -> None:
    function, arguments = SAID[message]
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function(**arguments)


def test_arguments_of_lightning_and_of_ddp_are_let_through() -> None:
    strategy = le.ElasticEntropyStrategy(process_group_backend="gloo", find_unused_parameters=True, bucket_cap_mb=10)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "bucket_cap_mb": 10}


def test_what_is_meant_are_arguments_of_ours() -> None:
    fields = set(le.Relaxation.__dataclass_fields__)
    assert {name for names in MEANT.values() for name in names} <= fields
    assert not fields & set(MEANT)
