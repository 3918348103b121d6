"""Kill a training in a step and resume it. ``python -m tests.soak`` does so, and worse, at random moments."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning_modules import CALLBACKS, Automatic, Manual, Pair, Stream, trainer

KINDS: dict[str, Any] = {"automatic": Automatic, "manual": Manual, "pair": Pair}
EPOCHS = 2


class Suicide(L.Callback):
    """SIGKILL in the middle of a step, between the gradient and the update."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kind: str, name: str, *more: L.Callback) -> dict[str, torch.Tensor]:
    """Train to the end, from the last checkpoint if there is one."""
    module = KINDS[kind]()
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1, filename="step")
    t = trainer(folder, callbacks=[CALLBACKS[name](), keep, *more], enable_checkpointing=True, max_epochs=EPOCHS)
    last = folder / "last.ckpt"
    t.fit(module, Stream(), ckpt_path=last if last.exists() else None)
    return dict(module.state_dict())


def kill_and_resume(folder: Path, kind: str, name: str, kill_at: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the final weights of a run that was killed and resumed, and of one that was not."""
    killed, whole = folder / "killed", folder / "whole"
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=run, args=(killed, kind, name, Suicide(kill_at)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run must be killed, got exit code {process.exitcode}"
    return run(killed, kind, name), run(whole, kind, name)
