"""Kill a training at any moment and see that it ends where an undisturbed one does, bit for bit.

``python -m tests.kill_callback --rounds 100`` goes on for as long as one likes, at random steps; the tests call
:func:`kill_and_resume` for a few.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning_modules import BATCHES, CALLBACKS, Automatic, Manual, Pair, Stream, same, trainer

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


def main() -> None:
    """Go on for some rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    for i in range(arguments.rounds):
        kind, name = draw.choice(list(KINDS)), draw.choice(list(CALLBACKS))
        step = draw.randrange(1, EPOCHS * BATCHES)
        with tempfile.TemporaryDirectory() as folder:
            resumed, whole = kill_and_resume(Path(folder), kind, name, step)
        print(f"{i}: {kind} {name} killed in step {step}: {'equal' if same(resumed, whole) else 'DIFFERENT'}")
        if not same(resumed, whole):
            sys.exit(1)


if __name__ == "__main__":
    main()
