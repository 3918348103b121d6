"""The private names of Lightning that the diagnostics rely on."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_entropy.diagnostics.lightning_internals import logger_step
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE


class Two(tiny.TinyModule):
    """Two optimizers, so that ``global_step`` is another number than the step of the logs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
        self.log("at_epoch_end", float(index), on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.seen.append(logger_step(self.trainer))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 4)]


class Records(CSVLogger):
    """The steps of Lightning's own records of an epoch's end."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "at_epoch_end" in metrics:
            self.steps.append(step)


def fit(module: pl.LightningModule, folder: Path, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(module, datamodule=tiny.TinyData())
    return trainer


def test_logger_step_is_the_step_of_lightnings_own_records(tmp_path: Path) -> None:
    logger = Records(tmp_path)
    logger.steps = []  # type: ignore[attr-defined]
    module = Two()
    trainer = fit(module, tmp_path, logger=logger)
    assert module.seen == logger.steps == [5, 11]  # type: ignore[attr-defined]
    assert trainer.global_step == 24
