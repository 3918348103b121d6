"""Two replicas on one device beside one process, under the Trainer.

They exchange through the host's memory, as replicas that share a card do.
"""

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_entropy as le
from benchmarks.gpu.record import Piece, Row
from recipes.resnet import ResNet18

ROOT = Path(__file__).parents[2]
BATCH = 64


class Net(L.LightningModule):
    """ResNet-18 on made-up images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = ResNet18(width)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(L.Callback):
    """Times the second half of the steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.begun = steps, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Start and stop."""
        if trainer.global_step in (self.steps // 2, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begun, self.seconds = time.perf_counter(), time.perf_counter() - self.begun


def main(device: str, replicas: int, steps: int, width: int) -> None:
    """Train on one device, and print the images per second of each process."""
    kind = torch.device(device)
    strategy: Any = "auto"
    if replicas > 1:
        strategy = le.ElasticEntropyStrategy(parallel_devices=[kind] * replicas)
    data = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(10, (512,)))
    clock = Clock(steps)
    trainer = L.Trainer(
        accelerator="gpu" if kind.type == "cuda" else "cpu",
        devices=replicas,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="bf16-mixed",
    )
    trainer.fit(Net(width), DataLoader(data, BATCH, shuffle=True))
    if trainer.is_global_zero:
        print(f"images per second: {BATCH * (steps - steps // 2) / clock.seconds}", flush=True)


def measure(device: torch.device, small: bool) -> list[Row]:
    """Return a row for one process and one for two replicas, each in processes of their own."""
    rows: list[Row] = []
    for replicas, words in ((1, "one process"), (2, "two replicas on one device")):
        arguments = [str(device), str(replicas), *(("12", "2") if small else ("400", "64"))]
        command = [sys.executable, "-m", "benchmarks.gpu.replicas", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        said = re.search(r"images per second: ([\d.]+)", done.stdout)
        if said is None:
            raise RuntimeError((done.stderr.strip().splitlines() or ["nothing was printed"])[-1])
        each = float(said[1])
        rows.append({"training": words, "images/s of each": each, "images/s together": replicas * each})
    return rows


def pieces(device: torch.device, small: bool) -> list[Piece]:
    """Return the piece."""
    return [Piece("replicas on one device", 60 if small else 150, partial(measure, device, small))]


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
