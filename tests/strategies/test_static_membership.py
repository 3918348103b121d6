"""Replicas that stay: the first process writes, and a checkpoint goes with all its files."""

from pathlib import Path
from typing import Any, cast

import pytest
from lightning.fabric.plugins import TorchCheckpointIO

import lightning_entropy as le
from lightning_entropy.strategies.membership import members
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.static_membership import StaticMembership

OPTIONS = ReplicaOptions(le.parle(), "auto", "all", False, None, None, "float32", True)


def test_it_is_what_static_names() -> None:
    assert type(members(OPTIONS)) is StaticMembership


def test_the_first_of_all_processes_writes() -> None:
    membership = StaticMembership(OPTIONS)
    assert [membership.writes(Grid(rank, 4, 2)) for rank in range(4)] == [True, False, False, False]


def test_a_checkpoint_is_removed_with_its_folder_and_another_stays(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).touch()
        (tmp_path / f"{name}.replicas").mkdir()
        (tmp_path / f"{name}.replicas" / "0.pt").touch()
    StaticMembership(OPTIONS).remove(TorchCheckpointIO(), tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt", "b.ckpt.replicas"]


class Strategy:
    """Stands for the strategy of a process alone."""

    def broadcast(self, value: str) -> str:
        return value

    def barrier(self) -> None: ...


def test_a_lighthouse_that_is_there_for_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://127.0.0.1:1")
    with pytest.warns(UserWarning, match=r"this job meets no other.* need Strategy\(membership='torchft'\)"):
        StaticMembership(OPTIONS).prepare(cast(Any, Strategy()), Grid(0, 1, 1))
