"""Train the language model once, and leave one file: what was asked, the loss at the end, what was sent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.optim import Optimizer

import lightning_entropy as le
from recipes.classifier import Cosine
from recipes.compare.lm.methods import EMA_MEMORY, METHODS, Arm, Method
from recipes.compare.run import DIVERGED, settle, written_out
from recipes.data.cache import write
from recipes.lm.data import TextData
from recipes.lm.gpt import GPT
from recipes.lm.module import LanguageModel
from recipes.lm.muon import Muon
from recipes.lm.traffic import Traffic


@dataclass(frozen=True)
class Task:
    """What all methods share.

    Attributes:
        net: arguments of ``GPT``.
        files: of the text; None: the standard library.
        batch_size: windows of a step, all replicas together.
        val_windows: windows of the validation.
        steps: of a training at equal tokens.
        warmup: share of training before the cosine.
        final: the rate at its end, over the largest.
        weight_decay: of AdamW and Muon.
        beta2: of AdamW, that of Muon's other parameters, too.
    """

    net: Mapping[str, int] = field(default_factory=dict)
    files: list[str] | None = None
    batch_size: int = 32
    val_windows: int = 512
    steps: int = 900
    warmup: float = 0.05
    final: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95

    @property
    def tokens_per_step(self) -> int:
        """Of all replicas together."""
        return self.batch_size * self.net["block_size"]

    def data(self, replicas: int, seed: int) -> TextData:
        """Return the text with each of the replicas' share of a batch."""
        return TextData(
            self.files,
            block_size=self.net["block_size"],
            batch_size=self.batch_size // replicas,
            val_windows=self.val_windows,
            seed=seed,
        )

    def optimizer(self, method: Method, lr: float) -> partial[Optimizer]:
        """Return what makes a method's AdamW or Muon from groups of parameters."""
        common = {"lr": lr, "betas": (method.beta1, self.beta2), "weight_decay": self.weight_decay}
        return (
            partial(torch.optim.AdamW, fused=True, **common) if method.optimizer == "adamw" else partial(Muon, **common)
        )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: what is shared.
        arm: the method.
        settings: ``lr`` and what else the method chooses.
        seed: of initial weights and order.
        steps: of the optimizer.
    """

    task: Task
    arm: Arm
    settings: Mapping[str, float]
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """A file name of this run alone; it changes with the method's defaults, too."""
        method = METHODS[self.arm.method]
        loop = method.relaxation and method.relaxation(max(self.arm.inner_steps, 1), self.settings)
        beta1 = "" if method.beta1 == Method.beta1 else f"beta1={method.beta1}"
        digest = hashlib.sha256((self.to_json() + written_out(loop) + beta1).encode()).hexdigest()[:10]
        label = re.sub(r"[^A-Za-z0-9_.=]+", "-", f"{self.arm}")
        return f"{label}-lr{self.settings['lr']:g}-seed{self.seed}-{digest}"

    @property
    def replicas(self) -> int:
        """How many copies of the net are trained."""
        return self.arm.replicas

    @property
    def module(self) -> str:
        """The module whose command line trains it."""
        return "recipes.compare.lm.run"

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        return f"{self.arm}, {chosen}, {self.steps} steps, seed {self.seed}"

    def to_json(self) -> str:
        """Return the text that :meth:`from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"task": Task(**values["task"]), "arm": Arm(**values["arm"])})


def execute(run: Run, folder: Path, name: str | None = None) -> Path:
    """Train ``run`` on the CPU and write ``folder/<name>.json``, which appears whole or not at all.

    Args:
        run: what to train.
        folder: where.
        name: None is the run's.

    Returns:
        The file.
    """
    L.seed_everything(run.seed, verbose=False)
    task, arm = run.task, run.arm
    data = task.data(arm.replicas, run.seed)
    module = make_module(run)
    trainer = make_trainer(run)
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
        # The Trainer brings rank 0's metrics back from the replicas' processes.
        loss, sent = (float(trainer.callback_metrics[key]) for key in ("val_loss", "bytes_sent"))
    except Exception as error:
        if DIVERGED not in str(error):
            raise
        loss, sent = math.nan, math.nan
    record = {
        "run": json.loads(run.to_json()),
        "tokens": run.steps * task.tokens_per_step,
        "parameters": sum(p.numel() for p in module.parameters()),
        "val_loss": loss,
        "bytes_per_token": sent * arm.replicas / (run.steps * task.tokens_per_step),
        "seconds": time.perf_counter() - started,
        "text": data.digest,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
    }
    path = folder / f"{name or run.name}.json"
    write(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    return path


def make_module(run: Run) -> LanguageModel:
    """Make the language model with the run's optimizer and schedule."""
    optimizer = run.task.optimizer(METHODS[run.arm.method], run.settings["lr"])
    return LanguageModel(
        GPT(**run.task.net), optimizer, schedule=Cosine(run.task.warmup, final=run.task.final), sample=0
    )


def make_trainer(run: Run) -> L.Trainer:
    """Make a Trainer that takes the run's steps and validates at the end."""
    arm, method = run.arm, METHODS[run.arm.method]
    callbacks: list[Callback] = [Traffic()]
    strategy: Any = "auto"
    if method.ema:
        callbacks.append(EMAWeightAveraging(decay=1 - 1 / max(EMA_MEMORY * run.steps, 1)))
    relaxation = method.relaxation and method.relaxation(arm.inner_steps, run.settings)
    if not method.replicated:
        callbacks += [le.InnerOuterCallback(relaxation)] if relaxation else []
    elif relaxation:
        strategy = le.ElasticEntropyStrategy(relaxation, communication_dtype=arm.format, start_method="fork")  # type: ignore[arg-type]
    else:
        strategy = "ddp_fork"
    return L.Trainer(
        max_steps=run.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=arm.replicas,
        strategy=strategy,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        val_check_interval=run.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    settle(int(sys.argv[4]), json.loads(sys.argv[5]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    execute(Run.from_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
