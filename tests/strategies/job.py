"""A script that trains replicas, as users start it: by itself, under torchrun, or from a configuration.

``python -m tests.strategies.job FOLDER STRATEGY`` or ``python -m tests.strategies.job fit --config FILE``.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

import lightning_entropy  # noqa: F401  the strategy's names
from tests.strategies.streams import Streaming


class Final(L.Callback):
    """Write every rank's final weights to ``folder/final.<rank>.pt``."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name = f"final.{trainer.global_rank}.pt"
        torch.save(pl_module.state_dict(), Path(self.folder) / name)


class DiesOnce(L.Callback):
    """SIGKILL of rank 1 at step 7, the first time."""

    def __init__(self, folder: str) -> None:
        self.marker = Path(folder) / "died"

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 7 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, strategy: str, *more: str) -> None:
    L.seed_everything(7, verbose=False)
    keep = ModelCheckpoint(folder, "at", every_n_train_steps=1, save_last=True, enable_version_counter=False)
    callbacks: list[L.Callback] = [keep, Final(folder), *([DiesOnce(folder)] if "die" in more else [])]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    trainer.fit(Streaming(), ckpt_path="last")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "fit":
        LightningCLI(Streaming, save_config_callback=None)
    else:
        main(*sys.argv[1:])
