"""Ranks that torchrun has restarted find each other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.strategies.runs import FORK_WARNINGS, final_weights, script

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


def test_torchrun_starts_again_where_the_last_checkpoint_is(tmp_path: Path, expected: dict[str, Any]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = script(*torchrun, "-m", "tests.strategies.job", tmp_path, "elastic_entropy", "die")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    for weights in final_weights(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())
