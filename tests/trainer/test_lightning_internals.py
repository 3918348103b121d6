"""The private names of Lightning that the trainer's floor relies on."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_entropy.trainer.lightning_internals import (
    before_batch_transfer,
    logger_step,
    saves_a_folder,
    without_iterator,
)
from tests.lightning_modules import LIGHTNING_WARNINGS, Pair, loader, trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


class Logs(CSVLogger):
    """Compare the step of every record of Lightning's own with ours."""

    trainer: Any
    steps: list[tuple[int, int]]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.steps.append((step, logger_step(self.trainer)))


class LogsLoss(Pair):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("seen", float(batch_idx))


def test_logger_step_is_the_step_of_lightnings_own_records(tmp_path: Path) -> None:
    """With two optimizers ``global_step`` is another number."""
    logger = Logs(tmp_path)
    logger.steps = []
    run: L.Trainer = trainer(tmp_path, logger=logger, max_epochs=2, log_every_n_steps=1)
    logger.trainer = run
    run.fit(LogsLoss(), loader())
    assert len(logger.steps) == 24
    assert all(theirs == ours for theirs, ours in logger.steps)
    assert run.global_step > max(ours for _, ours in logger.steps) + 1


def test_before_batch_transfer_runs_the_modules_hook() -> None:
    seen: list[Any] = []

    class Hooked(Pair):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [*batch, "hooked"]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(before_batch_transfer(self, [1, 2]))

    trainer(max_epochs=1, limit_train_batches=1).fit(Hooked(), loader())
    assert seen == [[1, 2, "hooked"]]


@pytest.mark.processes
def test_without_iterator_leaves_the_workers_of_the_original_alone() -> None:
    persistent = loader(num_workers=1, persistent_workers=True)
    running = iter(persistent)
    next(running)
    own = without_iterator(persistent)
    assert persistent._iterator is running
    assert iter(own) is not running


@pytest.mark.parametrize("distributed", [True, False])
def test_whether_a_strategy_saves_a_folder(distributed: bool) -> None:
    assert saves_a_folder(ModelParallelStrategy(save_distributed_checkpoint=distributed)) is distributed
