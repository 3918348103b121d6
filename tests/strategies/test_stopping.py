"""Replicas stop together, whoever asks for it, and without a word between them in a batch."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

import lightning_entropy as le
from lightning_entropy.strategies import liveness
from lightning_entropy.strategies.stopping import JointStop
from tests.strategies.runs import FORK_WARNINGS, Net, external, fit, strategy, trainer

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]

PARLE = le.parle(4, 0.1, 0.3, 0.25)


class Steps(L.Callback):
    """Write at which step a rank's fit came to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, trainer: L.Trainer) -> None:
        (self.folder / f"{trainer.global_rank}.step").write_text(str(trainer.global_step))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.write(trainer)


def steps(folder: Path, n: int) -> list[int]:
    return [int((folder / f"{rank}.step").read_text()) for rank in range(n)]


def killed(number: int) -> None:
    os.kill(os.getpid(), number)


class Acts(L.Callback):
    """Do something on rank 1 alone, at some moment of a fit."""

    def __init__(self, moment: str, act: Callable[[L.Trainer], None]) -> None:
        self.moment, self.act, self.done = moment, act, False

    def at(self, moment: str, trainer: L.Trainer) -> None:
        if moment == self.moment and trainer.global_rank == 1 and trainer.global_step >= 5 and not self.done:
            self.done = True
            self.act(trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.at("training", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("batch end", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self.at("save", trainer)


class Logs(Net):
    """Log a mean over the ranks in every training step."""

    def training_step(self, batch: Any, i: int) -> Any:
        loss = super().training_step(batch, i)
        self.log("loss", loss, sync_dist=True)
        return loss


@pytest.mark.parametrize("moment", ["training", "validation", "save"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("n", [2, 4])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, moment: str, number: Any, n: int) -> None:
    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        keep = ModelCheckpoint(tmp_path, "at", every_n_train_steps=6)
        run = trainer(
            tmp_path,
            strategy(PARLE, start_method="popen", replicas=2),
            n,
            callbacks=[Acts(moment, lambda _: killed(number)), keep, Steps(tmp_path)],
            max_epochs=40,
            limit_val_batches=2,
        )
        run.fit(Logs())

    said = external(n, work, timeout=40)
    ending = "SIGTERMException: " if number == signal.SIGTERM else "SystemExit: 1"
    assert said == [ending] * n
    reached = steps(tmp_path, n)
    assert len(set(reached)) == 1
    assert reached[0] < 30


@pytest.mark.parametrize("batches", [8, 50])
@pytest.mark.parametrize("how", ["should_stop", "Timer"])
def test_one_rank_that_wants_to_stop_stops_all_at_the_next_meeting(tmp_path: Path, how: str, batches: int) -> None:
    def stop(trainer: L.Trainer) -> None:
        trainer.should_stop = True

    class Late(Timer):
        def time_remaining(self, *_: Any) -> float:
            return 0.0 if self.late else 100.0

        late = False

    timer = Late(timedelta(minutes=5))

    def run_out(trainer: L.Trainer) -> None:
        timer.late = True

    act = Acts("batch end", stop if how == "should_stop" else run_out)
    own = {"make": lambda: Net(samples=8 * batches), "callbacks": [act, timer, Steps(tmp_path)], "max_epochs": 40}
    ranks = fit(tmp_path, strategy(PARLE), 2, **own)
    # Said in the exchange that starts after step 8, heard at step 12; or at the end of an epoch.
    assert steps(tmp_path, 2) == [min(batches, 12)] * 2
    for value in zip(*(rank["final"].values() for rank in ranks), strict=True):
        assert torch.equal(*value)


def test_the_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, "auto", 1)
    stop = JointStop(run, 0)
    run.fit_loop.epoch_loop  # noqa: B018
    stop.install()
    try:
        killed(signal.SIGINT)
        assert stop.wanted
        with pytest.raises(KeyboardInterrupt):
            killed(signal.SIGINT)
    finally:
        stop.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_rank_stops_alone_where_no_exchange_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PATIENCE", 0.1)
    stop = JointStop(trainer(tmp_path, "auto", 1), 0)
    stop.install()
    try:
        killed(signal.SIGTERM)
        stop.check()
        time.sleep(0.2)
        with pytest.raises(SystemExit):
            stop.check()
    finally:
        stop.remove()


def test_a_handler_of_the_users_is_called_too(tmp_path: Path) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    stop = JointStop(trainer(tmp_path, "auto", 1), 0)
    try:
        stop.install()
        killed(signal.SIGTERM)
    finally:
        stop.remove()
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


COLLECTIVES = ["all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "barrier", "broadcast_object_list"]


class Counts(L.Callback):
    """Count the collectives of every training batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.per_batch = folder, [], []
        for name in COLLECTIVES:
            setattr(dist, name, self.counting(name, getattr(dist, name)))

    def counting(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return original(*args, **kwargs)

        return call

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.calls = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.per_batch.append(self.calls)
        self.calls = []

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        torch.save(self.per_batch, self.folder / f"calls.{trainer.global_rank}.pt")


def test_nothing_passes_between_replicas_in_a_batch_but_at_outer_steps(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(PARLE, start_method="popen")
        run = trainer(tmp_path, own, 2, callbacks=[Counts(tmp_path), Timer(timedelta(hours=1))], max_epochs=1)
        run.fit(Logs())

    assert external(2, work) == ["", ""]
    for rank in range(2):
        per_batch = torch.load(tmp_path / f"calls.{rank}.pt")
        # L = 4: an exchange starts with every loop, two all-reduces; the first batch's has them too.
        assert [len(calls) for calls in per_batch] == [2, 0, 0, 0, 2, 0, 0, 0]


class Gathers(Net):
    """What collectives of the module's own span, in training and in validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.seen: dict[str, Any] = {}

    def look(self, moment: str) -> None:
        own = torch.tensor([float(self.global_rank)])
        strategy: Any = self.trainer.strategy
        self.seen[moment] = [
            self.all_gather(own).flatten().tolist(),
            strategy.reduce(own.clone(), reduce_op="mean").tolist(),
            strategy.broadcast(self.global_rank),
        ]

    def training_step(self, batch: Any, i: int) -> Any:
        self.look("training")
        return super().training_step(batch, i)

    def validation_step(self, batch: Any, i: int) -> None:
        self.look("validation")

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"seen.{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
@pytest.mark.parametrize("data_parallel", [1, 2])
def test_what_a_collective_of_the_users_spans(tmp_path: Path, data_parallel: int) -> None:
    n = 2 * data_parallel
    fit(tmp_path, strategy(PARLE, replicas=2), n, make=lambda: Gathers(tmp_path), max_epochs=1, limit_val_batches=1)
    for rank in range(n):
        seen = torch.load(tmp_path / f"seen.{rank}.pt")
        first = rank // data_parallel * data_parallel
        inside = [float(r) for r in range(first, first + data_parallel)]
        assert seen["training"] == [inside, [sum(inside) / data_parallel], first]
        everyone = [float(r) for r in range(n)]
        assert seen["validation"] == [everyone, [sum(everyone) / n], 0]
