"""A rank that dies or hangs: how the job ends, never by hanging and never silently."""

import ctypes
import os
import signal
import socket
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_entropy as le
from lightning_entropy.strategies import board
from lightning_entropy.strategies import liveness as heartbeat
from lightning_entropy.strategies.links import Links
from tests.kill_and_resume import MAIN, RENAME, UPDATE, WRITE, kill_and_resume
from tests.strategies.runs import FORK_WARNINGS, Net, external, fit, strategy, trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


PARLE = le.parle(3, 0.1, 0.3, 0.25)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pulse and a patience for tests."""
    monkeypatch.setattr(board, "PERIOD", 0.2)
    monkeypatch.setattr(heartbeat, "PATIENCE", 2.0)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("method", "rank", "step", "moment"),
    [("parle", 1, 7, UPDATE), ("int8", 0, 5, WRITE), ("diloco", 0, 8, MAIN), ("parle", 1, 9, RENAME)],
)
def test_a_killed_rank_ends_the_job_and_it_goes_on_exactly(
    tmp_path: Path, method: str, rank: int, step: int, moment: str
) -> None:
    equal, said, seconds = kill_and_resume(tmp_path, method, rank, step, moment)
    assert equal
    assert said.startswith(f"ReplicaLost: rank {rank} (replica {rank}) stopped answering")
    assert seconds < 30


class Dies(L.Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.parametrize(("dead", "relaxation"), [(0, PARLE), (2, PARLE), (2, le.entropy_sgd(3))])
def test_all_survivors_name_the_dead(
    tmp_path: Path, dead: int, relaxation: le.Relaxation, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Also those that hear of it from a survivor, or wait for one that gave up; and without elasticity."""
    monkeypatch.setattr(board, "LIMIT", 6.0)

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, strategy(relaxation, replicas=2, start_method="popen"), 4, callbacks=[Dies(dead)])
        run.fit(Net())

    said = external(4, work)
    assert said[dead] == f"exit {-signal.SIGKILL}"
    written = capfd.readouterr().err
    for rank in {0, 1, 2, 3} - {dead}:
        name = f"rank {dead} (replica {dead // 2})"
        stuck = f"stopped answering, and rank {rank} cannot go on, stuck"
        assert name in said[rank] or (said[rank] == "exit 1" and name in written and stuck in written)


class FakeStore:
    """One store for all ranks of a process; rank 0 can take it away."""

    values: ClassVar[dict[str, bytes]] = {}
    there = True
    port = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def set(self, key: str, value: str) -> None:
        self.multi_get([])
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if not FakeStore.there:
            raise RuntimeError("connection closed")
        return [self.values.get(key, b"") for key in keys]


def use_fake_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all ranks of this process meet at a fake store."""
    monkeypatch.setattr(FakeStore, "values", {})
    monkeypatch.setattr(FakeStore, "there", True)
    monkeypatch.setattr(heartbeat.dist, "TCPStore", FakeStore)
    monkeypatch.setattr(board, "listening_store", FakeStore)
    monkeypatch.setattr(heartbeat.dist, "broadcast_object_list", lambda port, src: port.__setitem__(0, 1))
    monkeypatch.setattr(heartbeat.dist, "all_gather_object", lambda errors, error: None)


def test_rank_0_keeps_the_store_until_the_others_have_read_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another rank found it."""
    use_fake_store(monkeypatch)
    beats = [heartbeat.Heartbeat(rank, 4, "host") for rank in range(4)]
    try:
        FakeStore().set("lost", "2")  # as rank 3 would
        assert beats[0].silent() == [2]
        FakeStore.there = False
        assert beats[1].silent() == [2]
    finally:
        for beat in beats:
            beat.stop()


class Waits(L.Callback):
    """Wait in a collective of Lightning's own for a rank that has died: nothing fails before the timeout."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if trainer.global_step == 5:
            torch.distributed.barrier()


@pytest.mark.processes
def test_a_rank_that_is_stuck_ends_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(board, "LIMIT", 3.0)

    def work(rank: int) -> None:
        trainer(tmp_path, strategy(PARLE, start_method="popen"), 2, callbacks=[Waits()]).fit(Net())

    said = external(2, work, until=0)
    assert said[0] == "exit 1"
    assert "rank 1 (replica 1) stopped answering, and rank 0 cannot go on, stuck" in capfd.readouterr().err


@pytest.mark.processes
def test_without_a_store_one_trains_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(torch.distributed.TCPStore):
        def __init__(self, host: str, port: int, *args: Any, **kwargs: Any) -> None:
            if os.environ.get("LOCAL_RANK") == "1":
                raise RuntimeError("no route")
            super().__init__(host, port, *args, **kwargs)

    monkeypatch.setattr(heartbeat.dist, "TCPStore", Closed)
    with pytest.raises(Exception, match=r"a rank that dies will not be named: .* \(rank 1: no route\)"):
        fit(tmp_path, strategy(PARLE), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(fit(tmp_path, strategy(PARLE), 2)) == 2


class Stalls(L.Callback):
    """SIGSTOP: alive for the operating system, and for nobody else."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.processes
def test_a_rank_that_stands_still_is_named_after_the_timeout(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(PARLE, start_method="popen", timeout=timedelta(seconds=2))
        trainer(tmp_path, own, 2, callbacks=[Stalls()]).fit(Net())

    start = time.monotonic()
    said = external(2, work, timeout=40, until=0)
    assert "rank 1 (replica 1) stopped answering" in said[0]
    assert time.monotonic() - start < 30


class Fails(L.Callback):
    """Raise, or find the disk full, on one rank."""

    def __init__(self, rank: int, moment: str) -> None:
        self.rank, self.moment = rank, moment

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.moment == "step" and trainer.global_rank == self.rank and trainer.global_step == 5:
            raise ValueError("broken image")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.moment == "save" and trainer.global_rank == self.rank:
            raise OSError(28, "No space left on device")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.moment == "validation" and trainer.global_rank == self.rank:
            raise KeyboardInterrupt


@pytest.mark.processes
@pytest.mark.parametrize("format", ["float32", "int8"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("moment", "reason"),
    [("step", "ValueError: broken image"), ("save", "No space left on device"), ("validation", "KeyboardInterrupt")],
)
def test_a_rank_that_fails_is_named_with_its_reason(
    tmp_path: Path, format: Any, rank: int, moment: str, reason: str
) -> None:
    def work(rank_: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(PARLE, start_method="popen", communication_dtype=format)
        keep = ModelCheckpoint(tmp_path, every_n_train_steps=5)
        run = trainer(tmp_path, own, 2, callbacks=[Fails(rank, moment), keep], limit_val_batches=1)
        run.fit(Net())

    other = external(2, work)[1 - rank]
    assert other.startswith("ReplicaLost: ")
    assert f"rank {rank} (replica {rank}) ended with" in other
    assert reason in other


@pytest.mark.processes
def test_a_rank_that_dies_before_its_first_heartbeat_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "LIMIT", 3.0)
    watch = heartbeat.watch

    def dies(grid: Any, environment: Any) -> Any:
        if grid.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return watch(grid, environment)

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        monkeypatch.setattr("lightning_entropy.strategies.watched_ddp.watch", dies)
        trainer(tmp_path, strategy(PARLE, start_method="popen"), 3).fit(Net())

    said = external(3, work)
    assert said[1] == f"exit {-signal.SIGKILL}"
    assert said[0].startswith("ReplicaLost: ")
    assert "rank 1" in said[0].lower().replace("ranks", "rank") or "[1]" in said[0]
    assert said[2] != ""


def test_what_a_stranger_writes_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_store(monkeypatch)
    beats = [heartbeat.Heartbeat(rank, 3, "host") for rank in range(3)]
    try:
        for key, value in (("lost", "x"), ("lost", "-1,7"), ("lost", "\u00b2"), ("beat/2", "nonsense")):
            FakeStore().set(key, value)
            assert beats[0].silent(patience=1.0) == []
        assert all(beat._thread.is_alive() and beat._board._thread.is_alive() for beat in beats)
    finally:
        for beat in beats:
            beat.stop()


def test_the_store_listens_at_the_address_of_its_host_alone() -> None:
    store = board.listening_store("127.0.0.1", timedelta(seconds=5))
    with socket.socket() as elsewhere, pytest.raises(OSError, match="refused"):
        elsewhere.connect(("127.0.0.2", store.port))
    with socket.socket() as here:
        here.connect(("127.0.0.1", store.port))


class StopsAlone(Net):
    """Stop on one rank, behind the back of every callback."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank == 1 and self.trainer.global_step == 5:
            self.trainer.should_stop = True


class SavesAlone(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank == 1 and self.trainer.global_step == 5:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir, "alone.ckpt"))


@pytest.mark.processes
@pytest.mark.parametrize("module", [StopsAlone, SavesAlone])
@pytest.mark.parametrize("relaxation", [PARLE, le.diloco(3)])
def test_ranks_that_wait_for_each_other_at_different_places_end_and_say_where(
    tmp_path: Path, module: Any, relaxation: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(board, "LIMIT", 3.0)

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        trainer(tmp_path, strategy(relaxation, start_method="popen"), 2).fit(module(samples=800))

    said = external(2, work, timeout=40)
    assert "hung" not in said
    assert "exit 1" in said
    assert "different places: rank 0 (replica 0) at an outer step, rank 1 (replica 1) at " in capfd.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("seconds", [0, 7])  # more than PATIENCE
def test_a_rank_that_has_ended_before_the_others_is_named(
    tmp_path: Path, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last meeting was another one for the others; closing its groups may keep all its threads for a while."""

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        close, naps = Links.close, [seconds]

        def slowly(links: Links) -> None:
            close(links)
            ctypes.PyDLL(None).sleep(naps.pop() if naps else 0)  # does not let go of the interpreter

        if rank == 1:
            monkeypatch.setattr(Links, "close", slowly)
        trainer(tmp_path, strategy(PARLE, start_method="popen"), 2).fit(StopsAlone())

    said = external(2, work, timeout=40)
    assert said[1] == ""
    assert said[0].startswith("ReplicaLost: rank 1 (replica 1) ended with its fit, and rank 0 cannot go on")
