"""A script for the launcher: ``training.py FOLDER METHOD PLAN [DEVICES]``.

A plan is "die", "endless" or a number of steps. "die": the last rank of replica 1 is killed once after step 45, and all
end together, 60 steps after it has joined again.
"""

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_entropy as le
from lightning_entropy.strategies import ElasticEntropyStrategy

REPLICA = os.environ.get("REPLICA_GROUP_ID", "")


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0.002)
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Plan(L.Callback):
    def __init__(self, folder: Path, plan: str) -> None:
        self.folder, self.dies = folder, plan == "die" and REPLICA == "1" and not (folder / "died").exists()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, stop = trainer.global_step, self.folder / "stop"
        if step >= 5:
            (self.folder / f"started.{REPLICA}").touch()
        if self.dies and step >= 45 and trainer.global_rank == trainer.world_size - 1:
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        begins = REPLICA == "1" and trainer.global_rank == 0 and not self.dies
        if begins and (self.folder / "died").exists() and not stop.exists():
            part = self.folder / "stop.part"
            part.write_text(str(step + 60))
            part.replace(stop)
        if stop.exists() and step >= int(stop.read_text()):
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        with (self.folder / f"ended.{REPLICA}").open("a") as file:
            file.write(f"{type(exception).__name__}\n")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
        torch.save((trainer.global_step, module.state_dict()), self.folder / f"final.{REPLICA}{rank}.pt")


METHODS: dict[str, tuple[le.Relaxation, Any]] = {
    "parle": (le.parle(inner_steps=4), "float32"),
    "parle in int8": (le.parle(inner_steps=4), "int8"),
    "diloco": (le.diloco(inner_steps=4, outer_lr=0.3), "int8"),
    "streaming": (le.streaming_diloco(4, 2, 2, outer_lr=0.3), "int8"),
}


def main(folder: str, method: str, plan: str, devices: str = "1") -> None:
    torch.manual_seed(int(REPLICA))  # which the replicas that begin later give up for the first's
    inputs, targets = torch.randn(64, 5), torch.randint(3, (64,))
    keep = ModelCheckpoint(folder, "at", every_n_train_steps=20, save_last=True, enable_version_counter=False)
    relaxation, format = METHODS[method]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(devices),
        strategy=ElasticEntropyStrategy(relaxation, communication_dtype=format, membership="torchft"),
        max_epochs=-1,
        max_steps=int(plan) if plan.isdecimal() else -1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep, Plan(Path(folder), plan)],
    )
    trainer.fit(Net(), DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True), ckpt_path="last")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
