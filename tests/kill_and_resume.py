"""Kill a rank of a job of replicas at any moment; the job ends by itself, and resumes to where an undisturbed one ends.

``python -m tests.kill_and_resume --rounds 20`` kills at random moments; the tests use :func:`kill_and_resume`.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_entropy as le
from tests.strategies.runs import external, strategy, trainer
from tests.strategies.streams import Streaming

RANKS, STEPS = 2, 16
UPDATE, WRITE, MAIN, RENAME = (
    "between gradient and update",
    "while its own file is written",
    "while the main file is written",
    "before the files take their names",
)
MOMENTS = (UPDATE, WRITE, MAIN, RENAME)
METHODS: dict[str, Any] = {
    "parle": (le.parle(3, 0.1, 0.3), {}),
    "int8": (le.parle(3, 0.1, 0.3), {"communication_dtype": "int8"}),
    "diloco": (le.diloco(3), {}),
}


class Suicide(L.Callback):
    """SIGKILL of one rank, at a step and a moment in it."""

    def __init__(self, rank: int, step: int, moment: str) -> None:
        self.rank, self.step, self.moment = rank, step, moment

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank != self.rank:
            return
        write, rename = TorchCheckpointIO.save_checkpoint, os.replace

        def save_checkpoint(io: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            of_a_replica = ".replicas" in str(path)
            if trainer.global_step >= self.step and self.moment == (WRITE if of_a_replica else MAIN):
                Path(path).parent.mkdir(exist_ok=True)
                Path(path).write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            write(io, checkpoint, path, storage_options)

        def replace(source: Any, target: Any) -> None:
            if trainer.global_step >= self.step and self.moment == RENAME and ".replicas" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        TorchCheckpointIO.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        os.replace = replace  # type: ignore[assignment]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step and self.moment == UPDATE:
            os.kill(os.getpid(), signal.SIGKILL)


def job(folder: Path, method: str, suicide: Suicide | None = None) -> list[str]:
    """Train to the end from the last checkpoint, if there is one, and return how every rank ended."""
    relaxation, kwargs = METHODS[method]

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        keep = ModelCheckpoint(folder, "at", every_n_train_steps=1, save_last=True, enable_version_counter=False)
        module = Streaming()
        folder.mkdir(parents=True, exist_ok=True)
        run = trainer(
            folder,
            strategy(relaxation, start_method="popen", **kwargs),
            RANKS,
            callbacks=[keep, *([suicide] if suicide else [])],
        )
        run.fit(module, ckpt_path="last")
        torch.save(module.state_dict(), folder / f"final.{rank}.pt")

    return external(RANKS, work)


def kill_and_resume(
    folder: Path, method: str, rank: int, step: int, moment: str, whole: dict[str, Any] | None = None
) -> tuple[bool, str, float]:
    """Kill, go on, and compare.

    Args:
        folder: an empty one.
        method: of METHODS.
        rank: that dies.
        step: at which.
        moment: of MOMENTS; the main file is written by rank 0.
        whole: the final weights of an undisturbed run, if there has been one.

    Returns:
        Whether the run ends with the undisturbed run's weights, what the surviving rank said, and how many seconds it
        took until the job had ended.
    """
    if whole is None:
        whole = undisturbed(folder / "whole", method)
    start = time.monotonic()
    said = job(folder, method, Suicide(rank, step, moment))
    seconds = time.monotonic() - start
    assert said[rank] == f"exit {-signal.SIGKILL}", said
    again = job(folder, method)
    assert again == [""] * RANKS, again
    final = torch.load(folder / "final.0.pt", weights_only=True)
    return all(torch.equal(v, whole[k]) for k, v in final.items()), said[1 - rank], seconds


def undisturbed(folder: Path, method: str) -> dict[str, Any]:
    """Return the final weights of a run that nobody kills."""
    said = job(folder, method)
    assert said == [""] * RANKS, said
    return torch.load(folder / "final.0.pt", weights_only=True)


def main() -> None:
    """Kill for some rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    whole: dict[str, Any] = {}
    for i in range(arguments.rounds):
        method, rank, step = draw.choice(list(METHODS)), draw.randrange(RANKS), draw.randrange(1, STEPS)
        moment = draw.choice(MOMENTS if rank == 0 else (UPDATE, WRITE, RENAME))
        with tempfile.TemporaryDirectory() as folder:
            if method not in whole:
                whole[method] = undisturbed(Path(folder) / "whole", method)
            equal, said, seconds = kill_and_resume(Path(folder), method, rank, step, moment, whole[method])
        print(
            f"{i}: {method}, rank {rank} killed at step {step} {moment}; after {seconds:.1f} s the other said "
            f"{said[:80]!r}; {'equal' if equal else 'DIFFERENT'}",
            flush=True,
        )
        if not equal or f"rank {rank}" not in said:
            sys.exit(1)


if __name__ == "__main__":
    main()
