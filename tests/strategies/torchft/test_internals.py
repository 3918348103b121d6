"""The private name of torchft."""

import pytest

pytest.importorskip("torchft")

import inspect

from torchft.coordination import ManagerClient


def test_the_client_asks_for_a_quorum() -> None:
    assert ManagerClient._quorum is not None
    text = inspect.signature(ManagerClient._quorum)
    names = ("group_rank", "step", "checkpoint_metadata", "shrink_only", "timeout", "commit_failures", "init_sync")
    assert set(names) <= set(text.parameters)
