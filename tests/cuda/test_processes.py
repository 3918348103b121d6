"""Replicas that share a device, and a sharded net on one."""

import re

import pytest
import torch

from tests.strategies.runs import script

pytestmark = pytest.mark.processes


def test_two_replicas_on_one_device(device: torch.device) -> None:
    done = script("-m", "benchmarks.gpu.replicas", str(device), "2", "12", "2", timeout=200)
    assert re.search(r"images per second: [\d.]+", done.stdout), done.stderr


@pytest.mark.parametrize("method", ["entropy_sgd", "heat", "diloco"])
def test_a_net_sharded_over_one_rank_takes_the_same_steps(method: str, device: torch.device) -> None:
    done = script("-m", "tests.cuda.sharded_job", str(device), method, timeout=200)
    found = re.search(r"difference ([\d.e+-]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) < 1e-6
