"""Files beside a checkpoint are those of the old save or of the new one, whenever a process dies."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_entropy.strategies import replica_files
from lightning_entropy.strategies.checkpoint import KEY
from lightning_entropy.strategies.options import Grid


class Crash(BaseException):
    pass


def test_two_that_write_one_file_at_a_time_leave_that_of_the_last(tmp_path: Path, monkeypatch: Any) -> None:
    """Where replicas come and go, one that was late may be writing yet when the next one does."""
    path, io = tmp_path / "last.ckpt", TorchCheckpointIO()
    replace = os.replace

    def between(*names: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        replica_files.save_whole(io, {"value": 2}, path, writer="1")
        replace(*names)

    monkeypatch.setattr(os, "replace", between)
    replica_files.save_whole(io, {"value": 1}, path, writer="0")
    assert torch.load(path, weights_only=True) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_while_saving_leaves_one_whole_checkpoint(tmp_path: Path, moment: int, monkeypatch: Any) -> None:
    """One process stands for both ranks, one after the other; it dies before its i-th write or rename."""
    path = tmp_path / "last.ckpt"
    grids = [Grid(rank, 2, 2) for rank in range(2)]

    def save(run: str, value: int) -> None:
        # The order that the barriers make: all stage, the first replaces, all commit.
        token = f"{run}-1"
        for grid in grids:
            replica_files.stage({"token": token, "value": value}, path, grid.file, token)
        replica_files.save_whole(TorchCheckpointIO(), {"value": value, KEY: {"token": token}}, path)
        for grid in grids:
            replica_files.commit(path, grid.file, token)

    def load() -> set[int]:
        main = torch.load(path, weights_only=True)
        token = main[KEY]["token"]
        contents = [replica_files.contents(path, str(r), token, True) for r in range(2)]
        return {main["value"]} | {content[token]["value"] for content in contents}

    save("first", 1)
    calls = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment + 1:
                raise Crash
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        io = TorchCheckpointIO
        patch.setattr(io, "save_checkpoint", counted(io.save_checkpoint))
        patch.setattr(os, "replace", counted(os.replace))
        with pytest.raises(Crash):
            save("second", 2)
    assert load() == ({1} if moment < 4 else {2})
    save("third", 3)
    assert load() == {3}
    assert sorted(os.listdir(f"{path}.replicas")) == ["0.pt", "1.pt"]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.ckpt.replicas"]


def test_reading_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(replica_files.ReplicaFileError, match=r"0\.pt cannot be read"):
        replica_files.read(str(tmp_path / "0.pt"), "token", True)
