"""What both strategies take: arguments, their checks, their names, and how a configuration writes them."""

import dataclasses
import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import Precision, TorchCheckpointIO
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_entropy as le
from lightning_entropy import ElasticEntropyStrategy
from lightning_entropy.methods import presets
from lightning_entropy.strategies.lightning_internals import timeout
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from tests import forked
from tests.strategies.runs import FORK_WARNINGS, final_weights, fit

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


@pytest.mark.parametrize(
    ("registry", "cls"),
    [(StrategyRegistry, le.ElasticEntropyStrategy), (STRATEGY_REGISTRY, le.ElasticEntropyFabricStrategy)],
)
def test_names(registry: Any, cls: Any) -> None:
    entropy, sgd = le.parle(), le.elastic_sgd()
    names = {"elastic_entropy": entropy, "elastic-entropy": entropy, "parle": entropy, "elastic_sgd": sgd}
    for name, relaxation in (names | {"elastic-sgd": sgd}).items():
        for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            strategy = registry.get(name + suffix)
            assert type(strategy) is cls
            assert strategy.relaxation == relaxation
            assert strategy._start_method == method
    cls.register_strategies(registry)  # a second import replaces


OURS = [le.ElasticEntropyStrategy, le.ElasticEntropyFabricStrategy]
ARGUMENTS = {
    "relaxation": le.elastic_sgd(4, 0.5),
    "replicas": 2,
    "data": "shard",
    "independent_init": True,
    "outer": torch.optim.Adam,
    "seed": 3,
    "communication_dtype": "int8",
    "overlap": False,
    "compile": True,
    "offload_anchor": True,
}


def test_both_strategies_take_the_same_arguments() -> None:
    names = [field.name for field in dataclasses.fields(ReplicaOptions)]
    assert names == [*ARGUMENTS, "membership", "min_replicas"]
    trainer, fabric = [list(inspect.signature(cls).parameters.values()) for cls in OURS]
    assert [p.name for p in trainer] == [*names, "kwargs"]
    assert [p for p in trainer if p.name not in ("membership", "min_replicas")] == fabric  # which Fabric has not


def elastic(**options: Any) -> ElasticEntropyStrategy:
    pytest.importorskip("torchft")
    return ElasticEntropyStrategy(membership="torchft", **options)


def test_membership_is_checked() -> None:
    assert timeout(elastic()) == timedelta(seconds=60) and timeout(ElasticEntropyStrategy()) == timedelta(minutes=30)
    assert timeout(elastic(timeout=timedelta(hours=1))) == timedelta(hours=1)
    unknown: Any = "dynamic"
    with pytest.raises(ValueError, match="membership must be 'static' or 'torchft', got 'dynamic'"):
        ElasticEntropyStrategy(membership=unknown)
    with pytest.raises(ValueError, match="min_replicas has no meaning with membership='static', got 2"):
        ElasticEntropyStrategy(min_replicas=2)
    for name, value, only in (
        ("replicas", 2, "'auto'"),
        ("data", "shard", "'all'"),
        ("independent_init", True, "False"),
        ("min_replicas", 0, "an int >= 1"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {only}"):
            elastic(**{name: value})


def test_a_job_knows_its_replica_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICA_GROUP_ID", "3")
    grid = elastic().options.grid(0, 1)
    assert (grid.replicas, grid.replica, grid.position, grid.data_parallel) == (1, 3, 0, 1)
    assert grid.seed(7) == Grid(3, 4, 4).seed(7)
    monkeypatch.setenv("REPLICA_GROUP_ID", "third")
    with pytest.raises(MisconfigurationException, match=r"REPLICA_GROUP_ID, .* got 'third'"):
        elastic().options.grid(0, 1)


@pytest.mark.parametrize("cls", OURS)
def test_arguments_are_public_attributes(cls: Any) -> None:
    by_name, by_position = cls(**ARGUMENTS), cls(*ARGUMENTS.values())
    for name, value in ARGUMENTS.items():
        assert getattr(by_name, name) is value
    assert by_name.options == by_position.options
    assert cls().relaxation == le.parle()


LIGHTNINGS: dict[str, Any] = {
    "process_group_backend": "gloo",
    "timeout": timedelta(minutes=5),
    "start_method": "fork",
    "parallel_devices": [torch.device("cpu")],
    "cluster_environment": LightningEnvironment(),
    "checkpoint_io": TorchCheckpointIO(),
    "find_unused_parameters": True,
}


@pytest.mark.parametrize("cls", OURS)
def test_lightnings_arguments_reach_lightning(cls: Any) -> None:
    accelerator: Any = CPUAccelerator()
    precision = {"precision_plugin": Precision()} if cls is OURS[0] else {"precision": FabricPrecision()}
    strategy = cls(accelerator=accelerator, **LIGHTNINGS, **precision)
    assert strategy.accelerator is accelerator
    assert strategy.process_group_backend == "gloo"
    assert timeout(strategy) == timedelta(minutes=5)
    for name in ("parallel_devices", "cluster_environment", "checkpoint_io"):
        assert getattr(strategy, name) is LIGHTNINGS[name]
    assert strategy._start_method == "fork"
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    for name, value in precision.items():
        assert getattr(strategy, name) is value


def test_a_configuration_names_lightnings_arguments() -> None:
    """They are behind ``**kwargs``, and still checked by name and type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")

    def parse(**init_args: Any) -> Any:
        config = {"class_path": "lightning_entropy.ElasticEntropyStrategy", "init_args": init_args}
        return parser.parse_object({"strategy": config}).strategy.init_args

    parsed = parse(replicas=2, start_method="fork", timeout="0:05:00", process_group_backend="gloo")
    assert (parsed.replicas, parsed.start_method, parsed.process_group_backend) == (2, "fork", "gloo")
    assert parsed.timeout == timedelta(minutes=5)
    with pytest.raises(Exception, match="start_method"):
        parse(start_method="never")
    with pytest.raises(Exception, match="nonsense"):
        parse(nonsense=1)


@pytest.mark.parametrize("cls", OURS)
def test_arguments_are_checked(cls: Any) -> None:
    for arguments, error in (
        ({"replicas": 0}, "replicas must be 'auto' or an int >= 1, got 0"),
        ({"data": "some"}, "data must be 'all' or 'shard', got 'some'"),
        ({"communication_dtype": "int2"}, "communication_dtype must be one of"),
        ({"replicas": True}, "replicas must be 'auto' or an int >= 1, got True"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"relaxation": presets.heat()}, "relaxation must have perturb=False"),
    ):
        with pytest.raises(ValueError, match=error):
            cls(**arguments)
    with pytest.raises(TypeError, match=r"relaxation must be a Relaxation, as .*, got 'parle': a method is a value"):
        cls("parle")


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_the_grid_is_rows_of_ranks(world_size: int, replicas: int) -> None:
    grids = [Grid(rank, world_size, replicas) for rank in range(world_size)]
    d = world_size // replicas
    assert [(g.replica, g.position) for g in grids] == [(r, p) for r in range(replicas) for p in range(d)]
    assert len({g.seed(5) for g in grids}) == replicas
    assert grids[0].seed(5) == 5
    grids[0].check(ValueError)
    with pytest.raises(KeyError, match=rf"number of processes \({world_size}\), got {world_size + 1}"):
        Grid(0, world_size, world_size + 1).check(KeyError)


@pytest.mark.processes
def test_replicas_divide_the_processes(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"replicas must divide the number of processes \(3\), got 2"):
        fit(tmp_path, ElasticEntropyStrategy(replicas=2, start_method="fork"), 3)


STRATEGIES: dict[str, Any] = {
    "by class": {
        "class_path": "lightning_entropy.ElasticEntropyStrategy",
        "init_args": {"start_method": "fork", "timeout": "0:05:00"},
        "dict_kwargs": {"find_unused_parameters": True},
    },
    "with a relaxation": {
        "class_path": "lightning_entropy.ElasticEntropyStrategy",
        "init_args": {
            "start_method": "fork",
            "relaxation": {
                "inner_steps": 25,
                "average": 0.25,
                "gamma": {
                    "class_path": "lightning_entropy.Scoping",
                    "init_args": {"start": 0.01, "rate": 1.0e-3, "limit": 1.0},
                },
                "rho": {
                    "class_path": "lightning_entropy.Scoping",
                    "init_args": {"start": 0.1, "rate": 1.0e-3, "limit": 1.0},
                },
            },
        },
    },
}


@pytest.mark.processes
@pytest.mark.parametrize("form", STRATEGIES)
def test_command_line(tmp_path: Path, form: str, expected: dict[str, Any]) -> None:
    config = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": STRATEGIES[form],
            "max_epochs": 2,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "tests.strategies.job.Final", "init_args": {"folder": str(tmp_path)}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = forked.run("tests.strategies.job", "fit", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    for weights in final_weights(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_lightning_itself_is_as_it_was(tmp_path: Path) -> None:
    assert (
        type(L.Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False).strategy).__name__ == "DDPStrategy"
    )
