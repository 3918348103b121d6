"""Small fits under Lightning's ModelParallelStrategy, and the same fit by one process with plain tensors."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_entropy as le
from tests.strategies import runs

EPOCHS = 3
BATCHES = 8  # an epoch

CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "entropy": lambda: le.EntropySGD(inner_steps=3, gamma=2.0, noise=0.1, seed=3),
    "nesterov": lambda: le.InnerOuterCallback(le.diloco(3), seed=3),
    "outer adam": lambda: le.InnerOuterCallback(le.lookahead(3), outer=torch.optim.Adam, seed=3),
    "heat": lambda: le.HeatSmoothing(inner_steps=3, width=0.1, scale="filter", seed=3),
}


class Net(runs.Net):
    """Sharded where there is a mesh; its validation reads the weights through a forward pass and by themselves."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.validated: list[float] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, i: int) -> Tensor:
        loss = super().training_step(batch, i)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            for _ in range(2):  # steps in one batch, each with noise of its own
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, i))
                optimizer.step()
        return loss

    def validation_step(self, batch: Any, i: int) -> None:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.validated.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    def train_dataloader(self) -> Any:
        return DataLoader(runs.Samples(), 8)


class Seen(L.Callback):
    """Keep the loss of every batch; save where it is told to."""

    def __init__(self, save_at: int | None = None, path: Path | None = None) -> None:
        self.losses: list[float] = []
        self.save_at, self.path = save_at, path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        if self.path is not None and trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


def fit(
    folder: Path,
    name: str,
    *,
    ranks: int | None,
    distributed: bool = True,
    save_at: int | None = None,
    ckpt_path: Path | None = None,
    manual: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Fit in this process, which is one of ``ranks``, or with plain tensors where that is None."""
    L.seed_everything(7, verbose=False)
    net, seen = Net(manual=manual), Seen(save_at, folder / "middle.ckpt")
    strategy: Any = "auto"
    if ranks is not None:
        strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=distributed)
    callbacks: list[L.Callback] = [seen, CALLBACKS[name]()]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks or 1,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        val_check_interval=3,
        default_root_dir=folder,
        **kwargs,
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    told = {"losses": seen.losses, "validated": net.validated, "final": whole(net.state_dict())}
    trainer.save_checkpoint(folder / "end.ckpt")
    return told


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in state.items()}


def play(rank: int, ranks: int, folder: Path) -> None:
    """Play fits one after another, and write what was seen."""
    warnings.filterwarnings("ignore", module=r"torch\.(distributed|nn)")  # theirs of views, of files that are there
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    told: dict[str, Any] = {}
    for name in CALLBACKS if ranks == 2 else ["entropy", "outer adam"]:
        for distributed in (True, False):
            at = folder / f"{name} {distributed}"
            options: dict[str, Any] = {"ranks": ranks, "distributed": distributed}
            if ranks == 2:
                told[f"{name} {distributed}"] = fit(at, name, save_at=16, **options)
            told[f"{name} {distributed} resumed"] = fit(at / str(ranks), name, ckpt_path=at / "middle.ckpt", **options)
    if ranks == 2:
        told["clipped"] = fit(folder / "clipped", "entropy", ranks=2, gradient_clip_val=0.05)
        told["accumulated"] = fit(folder / "accumulated", "heat", ranks=2, accumulate_grad_batches=2)
        told["manual"] = fit(folder / "manual", "heat", ranks=2, manual=True)
    torch.save(told, folder / f"{ranks}.{rank}.pt")
