"""Train once, and leave one file: what was asked, the curve, the end, the cost."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from recipes.classifier import Classifier, Cosine
from recipes.compare.budget import Budget, Kind
from recipes.compare.measure import error_and_loss, loss_rise, reestimated
from recipes.compare.methods import Method, Parts
from recipes.data import ImageData
from recipes.data.cache import write
from recipes.data.plan import EvaluationPlan

NETS = {"allcnn": "AllCNN", "wide_resnet": "WideResNet", "lenet": "LeNet"}


@dataclass(frozen=True)
class Task:
    """What all methods of a comparison share.

    Attributes:
        net: one of ``NETS``.
        net_args: its arguments.
        data: arguments of ``ImageData``, without the seed.
        epochs: passes over the training images, counting every gradient evaluation.
        weight_decay: of SGD.
        warmup: share of training in which the learning rate grows, before its cosine.
        points: points of the curve.
        precision: the Trainer's: ``32-true`` or ``bf16-mixed``.
        compile: compile the net.
        accelerator: the Trainer's.
        eval_images: most held-out images in a point of the curve, and most training images in any evaluation.
        refresh_images: training images that BatchNorm's statistics are re-estimated on.
    """

    net: str
    net_args: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    epochs: int = 30
    weight_decay: float = 1e-3
    warmup: float = 0.05
    points: int = 10
    precision: str = "32-true"
    compile: bool = False
    accelerator: str = "auto"
    eval_images: int = 4000
    refresh_images: int = 2000


@dataclass(frozen=True)
class Run:
    """One training: a task, a method, a learning rate, a seed, a kind of budget.

    Attributes:
        task: what is shared.
        method: ``Method``'s label.
        lr: SGD's learning rate at the top of the schedule.
        seed: of initial weights, order, augmentation and dropout.
        budget: ``compute`` or ``steps``.
    """

    task: Task
    method: str
    lr: float
    seed: int
    budget: Kind = "compute"

    @property
    def name(self) -> str:
        """A file name; another one for every other run."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        label = re.sub(r"[^A-Za-z0-9_.=]+", "-", self.method)
        return f"{label}-{self.budget}-lr{self.lr:g}-seed{self.seed}-{digest}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Make a run from what ``dataclasses.asdict`` made of it."""
        return cls(**values | {"task": Task(**values["task"])})


def execute(run: Run, folder: Path) -> Path:
    """Train ``run``, judge it, and write ``folder/<run.name>.json``, which appears whole or not at all.

    Returns:
        The file.
    """
    task, method = run.task, Method.parse(run.method)
    L.seed_everything(run.seed, verbose=False)
    data = ImageData(**task.data, seed=run.seed)
    data.prepare_data()
    data.setup()
    judge = Judge(task, data)
    steps = Budget(task.epochs, len(data.train_dataloader()), run.budget).steps(method.evaluations, method.replicas)
    parts = method.parts(run.lr, steps)
    module = Classifier(
        make_net(task, data),
        partial(torch.optim.SGD, lr=run.lr, momentum=0.9, nesterov=True, weight_decay=task.weight_decay),
        schedule=Cosine(warmup=task.warmup),
        num_classes=len(data.classes),
        sharpness=parts.sharpness,
        channels_last=True,
        compile=task.compile,
    )
    curve = folder / f"{run.name}.curve"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(task, method, parts, steps, Recorder(judge, curve, data.batch_size))
    trainer.fit(module, datamodule=data)
    # Through a file, as replicas train in processes of their own.
    record = json.loads(curve.read_text())
    final = judge.final(module.to(judge.device))
    # The curve ends with the weights that are kept, which some methods form when training is over.
    evaluations = record["gradient_evaluations"]
    record["curve"] = [point for point in record["curve"] if point["evaluations"] < evaluations]
    record["curve"].append(
        {
            "evaluations": evaluations,
            "epochs": evaluations * data.batch_size / len(data.train_indices),
            "seconds": record["seconds"],
        }
        | {key: value for key, value in final.items() if key.startswith("val_")}
    )
    record |= {
        "run": asdict(run),
        "steps": steps,
        "replicas": method.replicas,
        "parameters": sum(p.numel() for p in module.net.parameters()),
        "final": final,
        "peak_memory_mib": _peak_memory(),
        "versions": _versions(),
    }
    path = folder / f"{run.name}.json"
    write(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    curve.unlink()
    return path


def make_net(task: Task, data: ImageData) -> nn.Module:
    """Make the task's net for the data's classes and channels."""
    net = getattr(importlib.import_module(f"recipes.{task.net}"), NETS[task.net])
    return net(num_classes=len(data.classes), channels=data.shape[0], **task.net_args)


def make_trainer(task: Task, method: Method, parts: Parts, steps: int, recorder: Recorder) -> L.Trainer:
    """Make a Trainer that takes ``steps`` steps and shows the weights to the recorder ``task.points`` times."""
    length = {"max_epochs": task.epochs} if parts.by_epochs else {"max_steps": steps, "max_epochs": -1}
    return L.Trainer(
        **length,
        accelerator=task.accelerator,
        devices=method.replicas,
        strategy=parts.strategy() if parts.strategy else "auto",
        precision=task.precision,
        callbacks=[*parts.callbacks, recorder],
        val_check_interval=max(1, round(steps / task.points)),
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Judge:
    """Measure weights on fixed images, the same for every method, with running and with re-estimated statistics.

    Args:
        task: says how many images.
        data: set up.
    """

    def __init__(self, task: Task, data: ImageData) -> None:
        self.task = task
        self.data = data
        self.device = torch.device("cuda" if task.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        # The data module mixes training and held-out images, whatever the order of the files.
        self.train = data.train_indices[: task.eval_images]
        self.refresh = data.train_indices[: task.refresh_images]
        self.val = data.val_indices[: task.eval_images]

    def point(self, module: L.LightningModule) -> dict[str, float]:
        """Measure the error on the held-out images, in per cent."""
        return self._error("val", module, self.val)

    def final(self, module: L.LightningModule) -> dict[str, float]:
        """Measure errors on held-out, test and training images, and the rise of the training loss under noise."""
        result = self.point(module) | self._error("test", module, self.data.test_indices)
        result |= self._error("train", module, self.train)
        with self._precision(), reestimated(module, self._batches(self.refresh)):
            result["loss_rise"] = loss_rise(module, self._batches(self.train[:1000]))
        return result

    def _error(self, name: str, module: L.LightningModule, indices: Tensor) -> dict[str, float]:
        with self._precision():
            running, _ = error_and_loss(module, self._batches(indices))
            with reestimated(module, self._batches(self.refresh)):
                error, loss = error_and_loss(module, self._batches(indices))
        return {f"{name}_error_running": running, f"{name}_error": error, f"{name}_loss": loss}

    def _batches(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        plan = EvaluationPlan(indices, batch_size=self.data.eval_batch_size, crop=self.data.crop)
        for batch in range(len(plan)):
            yield self.data.materialise(plan[batch].to(self.device))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.precision == "bf16-mixed")


class Recorder(Callback):
    """Count gradients, time the training without the measurements, and measure whenever the Trainer validates.

    A Trainer's validation is when every callback and strategy shows the weights it would keep. Replicas have the
    same weights then, and rank 0 measures.

    Args:
        judge: measures.
        path: where rank 0 writes the curve when training ends.
        batch_size: images of a gradient evaluation.
    """

    def __init__(self, judge: Judge, path: Path, batch_size: int) -> None:
        self.judge = judge
        self.path = path
        self.batch_size = batch_size
        self.gradients = 0
        self.curve: dict[int, dict[str, float]] = {}
        self._seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and count every gradient of the first weight."""
        next(p for p in pl_module.parameters() if p.requires_grad).register_hook(self._count)
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the weights shown."""
        if trainer.is_global_zero:
            evaluations = self.gradients * trainer.world_size
            self.curve[evaluations] = {
                "evaluations": evaluations,
                "epochs": evaluations * self.batch_size / len(self.judge.data.train_indices),
                "seconds": self._seconds,
            } | self.judge.point(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the clock."""
        self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up the gradients of all replicas and write the curve."""
        self._stop()
        total = int(trainer.strategy.reduce(torch.tensor(float(self.gradients)), reduce_op="sum"))
        if trainer.is_global_zero:
            record = {
                "curve": list(self.curve.values()),
                "gradient_evaluations": total,
                "seconds": self._seconds,
                "images_per_second": total * self.batch_size / self._seconds,
            }
            write(self.path, lambda file: file.write(json.dumps(record).encode()))

    def _count(self, gradient: Tensor) -> None:
        self.gradients += 1

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._since


def _peak_memory() -> float:
    """Mebibytes of the GPU, or without one of the largest process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    kibibytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kibibytes / 2**10


def _versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "device": device,
    }


if __name__ == "__main__":
    execute(Run.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]))
