"""However a job of replicas is started: by name or by class, from Python, a configuration, or torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import StrategyRegistry

import lightning_entropy as le
from lightning_entropy import ElasticEntropyStrategy
from lightning_entropy.methods import presets
from lightning_entropy.strategies.lightning_internals import backend
from tests.strategies.runs import FORK_WARNINGS, fit
from tests.strategies.streams import Streaming

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def final(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"final.{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``elastic_entropy`` makes of it in forked processes."""
    folder = tmp_path_factory.mktemp("fork")
    weights: dict[str, Any] = fit(folder, "elastic_entropy_fork", 2, make=Streaming)[0]["final"]
    return weights


def test_names() -> None:
    for name, relaxation in (("elastic_entropy", le.parle()), ("elastic_sgd", le.elastic_sgd())):
        for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            strategy = StrategyRegistry.get(name + suffix)
            assert type(strategy) is ElasticEntropyStrategy
            assert strategy.relaxation == relaxation
            assert strategy._start_method == method
    ElasticEntropyStrategy.register_strategies(StrategyRegistry)  # a second import replaces


def test_arguments_are_checked() -> None:
    for arguments, error in (
        ({"replicas": 0}, "replicas must be 'auto' or an int >= 1, got 0"),
        ({"data": "some"}, "data must be 'all' or 'shard', got 'some'"),
        ({"communication_dtype": "int4"}, "communication_dtype must be one of"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"relaxation": presets.heat()}, "relaxation must have perturb=False"),
    ):
        with pytest.raises(ValueError, match=error):
            ElasticEntropyStrategy(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="relaxation must be a Relaxation, got str"):
        ElasticEntropyStrategy("parle")  # type: ignore[arg-type]


def test_replicas_divide_the_processes(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"replicas must divide the number of processes \(3\), got 2"):
        fit(tmp_path, ElasticEntropyStrategy(replicas=2, start_method="fork"), 3)


def test_replicas_that_share_a_gpu_use_gloo() -> None:
    cuda = torch.device("cuda:0")
    shared = ElasticEntropyStrategy(parallel_devices=[cuda, cuda])
    assert backend(shared) == "gloo"
    apart = ElasticEntropyStrategy(parallel_devices=[cuda, torch.device("cuda:1")])
    assert backend(apart) == "nccl"


@pytest.mark.parametrize("strategy", ["elastic_entropy", "elastic_entropy_spawn"])
def test_popen_and_spawn(tmp_path: Path, strategy: str, expected: dict[str, Any]) -> None:
    done = run("-m", "tests.strategies.job", tmp_path, strategy)
    assert done.returncode == 0, done.stderr
    for weights in final(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_torchrun_starts_again_where_the_last_checkpoint_is(tmp_path: Path, expected: dict[str, Any]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = run(*torchrun, "-m", "tests.strategies.job", tmp_path, "elastic_entropy", "die")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    for weights in final(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


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
    done = run("-m", "tests.strategies.job", "fit", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    for weights in final(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_lightning_itself_is_as_it_was(tmp_path: Path) -> None:
    assert (
        type(L.Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False).strategy).__name__ == "DDPStrategy"
    )
