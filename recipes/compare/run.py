"""Train once, and leave one file: what was asked, the curve, the end, the cost."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import os
import platform
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_entropy import Relaxation
from recipes.classifier import Classifier, Cosine
from recipes.compare.budget import Budget, Kind
from recipes.compare.judge import Judge, Recorder
from recipes.compare.methods import Method, Parts
from recipes.data import ImageData
from recipes.data.cache import write

DIVERGED = "the weights of every replica are nan or inf"  # what the strategy says when it ends a training

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
}
NETS = {"allcnn": "AllCNN", "wide_resnet": "WideResNet", "resnet": "ResNet18", "lenet": "LeNet", "mlp": "MLP"}


@dataclass(frozen=True)
class Task:
    """What all methods of a comparison share.

    Attributes:
        net: one of ``NETS``.
        net_args: its arguments.
        data: arguments of ``ImageData``, without the seed.
        epochs: passes over the training images, counting every gradient evaluation.
        weight_decay: of the optimizer.
        warmup: share of training in which the learning rate grows, before its cosine.
        points: points of the curve.
        precision: the Trainer's: ``32-true`` or ``bf16-mixed``.
        compile: compile the net.
        accelerator: the Trainer's.
        eval_images: most held-out images in a point of the curve, and most training images in any evaluation.
        refresh_images: training images that BatchNorm's statistics are re-estimated on.
        optimizer: one of ``OPTIMIZERS``.
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
    optimizer: str = "sgd"


def written_out(relaxation: Relaxation | None) -> str:
    """Return all fields of a method, the defaults too, which its repr leaves out: those of another version may differ.

    Example:
        >>> written_out(Relaxation(inner_steps=5))[:33]
        'Relaxation(inner_steps=5, gamma=0'
    """
    if relaxation is None:
        return "None"
    said = (f"{f.name}={getattr(relaxation, f.name)!r}" for f in fields(relaxation))
    return f"Relaxation({', '.join(said)})"


@dataclass(frozen=True)
class Run:
    """One training: a task, a method, a learning rate, a seed, a kind of budget.

    Attributes:
        task: what is shared.
        method: ``Method``'s label.
        lr: the optimizer's learning rate at the top of the schedule.
        seed: of initial weights, order, augmentation and dropout.
        budget: ``compute`` or ``steps``.
        weight_decay: of the optimizer; None is the task's.
    """

    task: Task
    method: str
    lr: float
    seed: int
    budget: Kind = "compute"
    weight_decay: float | None = None

    @property
    def name(self) -> str:
        """A file name of this run alone; it changes with the method's defaults, too."""
        method = Method.parse(self.method)
        text = json.dumps(asdict(self), sort_keys=True) + written_out(method.relaxation) + method.defaults
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        label = re.sub(r"[^A-Za-z0-9_.=]+", "-", self.method)
        decay = "" if self.weight_decay is None else f"-wd{self.weight_decay:g}"
        return f"{label}-{self.budget}-lr{self.lr:g}{decay}-seed{self.seed}-{digest}"

    @property
    def replicas(self) -> int:
        """How many copies of the net are trained."""
        return Method.parse(self.method).replicas

    @property
    def module(self) -> str:
        """The module whose command line trains it."""
        return "recipes.compare.run"

    def __str__(self) -> str:
        decay = "" if self.weight_decay is None else f" weight decay {self.weight_decay:g}"
        return f"{self.method} {self.budget} lr {self.lr:g}{decay} seed {self.seed}"

    def to_json(self) -> str:
        """Return the text that :meth:`from_dict` reads as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Make a run from its ``dataclasses.asdict``."""
        return cls(**values | {"task": Task(**values["task"])})


def execute(run: Run, folder: Path, name: str | None = None) -> Path:
    """Train ``run``, judge it, and write ``folder/<name>.json``, which appears whole or not at all.

    Args:
        run: what to train.
        folder: where.
        name: None is the run's.

    Returns:
        The file.
    """
    task, method, name = run.task, Method.parse(run.method), name or run.name
    L.seed_everything(run.seed, verbose=False)
    data = ImageData(**task.data, seed=run.seed)
    data.prepare_data()
    data.setup()
    judge = Judge(
        data,
        device=torch.device("cuda" if task.accelerator != "cpu" and torch.cuda.is_available() else "cpu"),
        precision=task.precision,
        eval_images=task.eval_images,
        refresh_images=task.refresh_images,
    )
    steps = Budget(task.epochs, len(data.train_dataloader()), run.budget).steps(method.evaluations, method.replicas)
    parts = method.parts(run.lr, steps)
    decay = task.weight_decay if run.weight_decay is None else run.weight_decay
    module = Classifier(
        make_net(task, data),
        partial(OPTIMIZERS[task.optimizer], lr=run.lr, weight_decay=decay),
        schedule=Cosine(warmup=task.warmup, final=parts.final),
        num_classes=len(data.classes),
        label_smoothing=parts.label_smoothing,
        sharpness=parts.sharpness,
        sharpness_start=parts.sharpness_start,
        channels_last=True,
        compile=task.compile,
    )
    curve = folder / f"{name}.curve"
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    recorder = Recorder(judge, curve, data.batch_size, keep_best=parts.stops)
    trainer = make_trainer(task, method, parts, steps, recorder)
    try:
        trainer.fit(module, datamodule=data)
        # Through a file, as replicas train in processes of their own.
        record = json.loads(curve.read_text())
        final = judge.final(module.to(judge.device))
        if not math.isfinite(final["train_loss"]):  # nan is always of class 0, an error of 90 % that says nothing
            final = judge.diverged()
    except Exception as error:
        if DIVERGED not in str(error):
            raise
        # A result, as the error of a net that has diverged alone is; the replicas' strategy ends the training.
        costs = ("seconds", "images_per_second", "peak_memory_mib")
        spent = round(steps * method.evaluations) * method.replicas
        record = {"curve": [], "gradient_evaluations": spent} | dict.fromkeys(costs, math.nan)
        final = judge.diverged()
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
        "versions": _versions(),
    }
    path = folder / f"{name}.json"
    write(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    curve.unlink(missing_ok=True)
    return path


def make_net(task: Task, data: ImageData) -> nn.Module:
    """Make the task's net for the data's classes and channels."""
    net = getattr(importlib.import_module(f"recipes.{task.net}"), NETS[task.net])
    return net(num_classes=len(data.classes), channels=data.shape[0], **task.net_args)


def make_trainer(task: Task, method: Method, parts: Parts, steps: int, recorder: Recorder) -> L.Trainer:
    """Make a Trainer that takes ``steps`` steps and shows the weights to the recorder ``task.points`` times."""
    cuda = task.accelerator != "cpu" and torch.cuda.is_available()
    length = {"max_epochs": task.epochs} if parts.by_epochs else {"max_steps": steps, "max_epochs": -1}
    return L.Trainer(
        **length,
        accelerator=task.accelerator,
        devices="auto" if cuda and parts.strategy else method.replicas,
        strategy=parts.strategy(cuda) if parts.strategy else "auto",
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


def _versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "device": device,
    }


def settle(parent: int, cores: list[int]) -> None:
    """Pin this process and its children to these cores, and end it with its parent. Linux only."""
    if sys.platform != "linux":
        return
    os.sched_setaffinity(0, cores)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended already
        sys.exit(143)


if __name__ == "__main__":
    settle(int(sys.argv[4]), json.loads(sys.argv[5]))
    execute(Run.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
