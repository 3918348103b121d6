"""Small fits in several processes, and what every rank recorded.

Nothing here, and no test, opens a process group in the test's own process: the garbage collector of a forked child
would wait for ever for one that is left over.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_entropy as le
from lightning_entropy.strategies import ElasticEntropyStrategy

ROOT = Path(__file__).parents[2]
SAMPLES, FEATURES, CLASSES = 64, 5, 3

# Lightning's and torch's own, in the parent and in the children.
FORK_WARNINGS = [
    "ignore:.*isinstance.treespec, LeafSpec.*:",
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*multi-threaded, use of fork.*:DeprecationWarning",
    "ignore:.*callbacks used to create the checkpoint need to be provided.*",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Using ModelCheckpoint with manual optimization",
]


def data(n: int = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, FEATURES, generator=g, dtype=torch.float64), torch.randint(CLASSES, (n,), generator=g)


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples that record which of them were read."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.inputs, self.targets = data(n)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.seen.append(int(i))
        return self.inputs[i], self.targets[i]


class Net(L.LightningModule):
    """A small classifier in float64."""

    def __init__(
        self, *, batch: int = 8, samples: int = SAMPLES, lr: float = 0.1, bn: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle: list[torch.nn.Module] = [torch.nn.BatchNorm1d(7)] if bn else []
        if dropout:
            middle.append(torch.nn.Dropout(dropout))
        self.net = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 7), *middle, torch.nn.Tanh(), torch.nn.Linear(7, CLASSES)
        ).double()
        self.batch, self.samples, self.lr = batch, samples, lr
        self.shuffle = True

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True)

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(self.samples), self.batch, shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        return DataLoader(Samples(16), 8)


class Record(L.Callback):
    """Keep x after every outer step and y after every step; write them to ``folder/<rank>.pt`` at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.anchors: list[list[Tensor]] = []
        self.iterates: list[list[Tensor]] = []
        self.seen: list[int] = []
        self.t = 0
        self.extra: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.anchors, self.iterates, self.t = [], [], 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        strategy: Any = trainer.strategy
        self.iterates.append([p.detach().clone() for p in pl_module.parameters()])
        loop = strategy._loops.loops.loops[0] if isinstance(strategy, ElasticEntropyStrategy) else None
        if loop is not None and loop.inner_step == 0:
            self.anchors.append([x.clone() for x in loop.anchor])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        seen = getattr(getattr(trainer.train_dataloader, "dataset", None), "seen", [])
        torch.save(
            {
                "anchors": self.anchors,
                "iterates": self.iterates,
                "seen": list(seen),
                "final": {k: v.clone() for k, v in pl_module.state_dict().items()},
                "metrics": {k: v.item() for k, v in trainer.callback_metrics.items()},
                **self.extra,
            },
            self.folder / f"{trainer.global_rank}.pt",
        )


def strategy(relaxation: le.Relaxation | None = None, **kwargs: Any) -> ElasticEntropyStrategy:
    return ElasticEntropyStrategy(relaxation, start_method=kwargs.pop("start_method", "fork"), **kwargs)


def trainer(folder: Path, strategy: Any, devices: int, **kwargs: Any) -> L.Trainer:
    kwargs = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in kwargs.get("callbacks", [])),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        **kwargs,
    }
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=folder, **kwargs)


def fit(
    folder: Path,
    strategy: Any,
    devices: int,
    *,
    module: L.LightningModule | None = None,
    callbacks: list[L.Callback] | None = None,
    ckpt_path: Any = None,
    make: Callable[[], L.LightningModule] = Net,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Fit, and return what every rank recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(7, verbose=False)
    module = make() if module is None else module
    run = trainer(folder, strategy, devices, callbacks=[Record(folder), *(callbacks or [])], **kwargs)
    run.fit(module, ckpt_path=ckpt_path)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(devices)]


def script(*arguments: str | Path, timeout: float = 100) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments, such as ``-m tests.strategies.job``, as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def final_weights(folder: Path) -> list[dict[str, Any]]:
    """Return the weights that the two ranks of ``tests.strategies.job`` have written."""
    return [torch.load(folder / f"final.{rank}.pt", weights_only=True) for rank in range(2)]


def external(
    n: int,
    work: Callable[[int], None],
    *,
    timeout: float = 60.0,
    until: int | Sequence[int] | None = None,
) -> list[str]:
    """Run ``work(rank)`` in n processes that look to the Trainer like a cluster's, as torchrun's do.

    Args:
        n: number of processes.
        work: of each.
        timeout: seconds after which those that have not ended are killed.
        until: a rank, or several; all are killed as soon as they have ended.

    Returns:
        How each ended: "" if normally, the exception's type and message, "exit <code>", or "hung".
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=_external, args=(rank, n, port, work, answers)) for rank in range(n)]
    for process in processes:
        process.start()
    said: dict[int, str] = {}
    end = time.monotonic() + timeout
    ranks = range(n) if until is None else [until] if isinstance(until, int) else until
    waited_for = [processes[rank] for rank in ranks]
    while any(p.is_alive() for p in waited_for) and time.monotonic() < end:
        while not answers.empty():
            said.update([answers.get()])
        time.sleep(0.01)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    while not answers.empty():
        said.update([answers.get()])
    return [said.get(r, "hung" if r in hung else f"exit {p.exitcode}") for r, p in enumerate(processes)]


def _external(rank: int, n: int, port: int, work: Callable[[int], None], answers: Any) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(n))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        work(rank)
        answers.put((rank, ""))
    except BaseException as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))
    os._exit(0)
