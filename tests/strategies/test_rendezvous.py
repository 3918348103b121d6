"""Ranks that torchrun has restarted find each other, and one that is alone needs no port."""

import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

import lightning_entropy as le
from tests.strategies.runs import FORK_WARNINGS, external, final_weights, script

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


def test_torchrun_starts_again_where_the_last_checkpoint_is(tmp_path: Path, expected: dict[str, Any]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = script(*torchrun, "-m", "tests.strategies.job", tmp_path, "elastic_entropy", "die")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    for weights in final_weights(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


def test_a_replica_of_one_rank_starts_where_another_job_has_its_port() -> None:
    pytest.importorskip("torchft")
    with socket.create_server(("", 0)) as other:

        def rank(_: int) -> None:
            os.environ.update(MASTER_PORT=str(other.getsockname()[1]), REPLICA_GROUP_ID="1")
            strategy: Any = L.Trainer(
                accelerator="cpu",
                devices=1,
                strategy=le.ElasticEntropyStrategy(membership="torchft"),
                logger=False,
                enable_checkpointing=False,
            ).strategy
            strategy.setup_distributed()
            assert dist.get_world_size() == 1

        assert external(1, rank) == [""]
