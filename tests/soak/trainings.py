"""Small trainings, drawn at random: what a round of the soak disturbs. Each can be repeated from its fields alone."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_entropy as le
from tests.lightning_modules import BATCHES, Automatic, Manual, Pair, Stream, loader, outer_adam, trainer

EPOCHS = 2
PLAIN = "plain"  # Lightning without a callback of ours, for what it does not do exactly either

# By name, a function of L and of the seed of the noise.
METHODS: dict[str, Callable[[int, int | None], le.InnerOuterCallback]] = {
    "entropy_sgd": lambda n, seed: le.EntropySGD(n, le.Scoping(0.5, 0.1), 0.01, seed=seed),
    "hamilton_jacobi": lambda n, seed: le.HamiltonJacobi(n, le.Scoping(0.5, 0.1), outer_momentum=0.5),
    "pull": lambda n, seed: le.EntropySGD(n, le.Pull(0.5), 0.01, outer_momentum=0.5, seed=seed),
    "coupled": lambda n, seed: le.EntropySGD(n, 0.5, coupled=True, reset_momentum=True, seed=seed),
    "entropy_adam": lambda n, seed: le.EntropySGD(n, 0.5, outer=outer_adam, seed=seed),
    "heat": lambda n, seed: le.HeatSmoothing(n, 100.0, seed=seed),
    "filter": lambda n, seed: le.InnerOuterCallback(le.heat(n, 2500.0, scale="filter"), seed=seed),
    "two_timescale": lambda n, seed: le.InnerOuterCallback(le.two_timescale(0.5, 0.01), seed=seed),
    "lookahead": lambda n, seed: le.InnerOuterCallback(le.lookahead(n), seed=seed),
    "diloco": lambda n, seed: le.InnerOuterCallback(le.diloco(n), seed=seed),
    "streaming": lambda n, seed: le.InnerOuterCallback(le.streaming_diloco(n, 2, n - 1), seed=seed),
    "composite": lambda n, seed: le.InnerOuterCallback(
        le.Relaxation(inner_steps=n, gamma=0.5, noise=0.01, average=0.5, width=0.05), seed=seed
    ),
}
MODULES: dict[str, Any] = {"automatic": Automatic, "manual": Manual, "pair": Pair}
# Moments that a user's code sees, by the function that is called: methods of the classes below.
HOOKS = (
    "training_step",
    "validation_step",
    "on_before_optimizer_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
)


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        method: a key of METHODS, or PLAIN.
        inner_steps: L.
        seed: of torch's generator; of the noise, if it is even.
        optimizer: "sgd" or "adamw".
        module: a key of MODULES; "pair" has two optimizers of its own.
        loader: "stream" saves its place, "ordered" and "shuffled" do not.
        validation: "none", in the "middle" of an epoch, or at its "end".
        dropout: "none"; "torch", from torch's generator, which nobody saves; "kept", from one in the module's state.
        accumulate: batches per step, in automatic optimization.
        batchnorm: with it, and :class:`lightning_entropy.RefreshBatchNorm` at every validation.
        schedule: of the learning rate, moved every step.
        save: every so many steps; 0: where Lightning does by default, after validation or the epoch.
        save_on_exception: also when one is raised.
        max_steps: after which it ends; -1: after EPOCHS.
        listener_first: whether the user's callback stands before ours.
    """

    method: str
    inner_steps: int
    seed: int
    optimizer: str = "sgd"
    module: str = "automatic"
    loader: str = "stream"
    validation: str = "none"
    dropout: str = "none"
    accumulate: int = 1
    batchnorm: bool = False
    schedule: bool = False
    save: int = 1
    save_on_exception: bool = False
    max_steps: int = -1
    listener_first: bool = False

    @classmethod
    def drawn(cls, draw: random.Random) -> "Training":
        """Return a random one."""
        module = draw.choice(["automatic", "automatic", "manual", "pair"])
        automatic = module == "automatic"
        return cls(
            method=draw.choice(list(METHODS)),
            inner_steps=draw.choice([1, 2, 3, 5, 7]),
            seed=draw.randrange(1000),
            optimizer=draw.choice(["sgd", "adamw"]),
            module=module,
            loader=draw.choice(["stream", "stream", "stream", "ordered", "shuffled"]),
            validation=draw.choice(["none", "middle", "end"]),
            dropout=draw.choice(["none", "none", "kept", "kept", "torch"]),
            accumulate=draw.choice([1, 1, 2, 5]) if automatic else 1,
            batchnorm=draw.random() < 0.3,
            schedule=automatic and draw.random() < 0.3,
            save=draw.choice([1, 1, 2, 3, 0]),
            save_on_exception=draw.random() < 0.3,
            max_steps=draw.choice([-1, -1, draw.randrange(5, 12)]),
            listener_first=draw.random() < 0.5,
        )

    @property
    def plain(self) -> "Training":
        """The same without us."""
        return dataclasses.replace(self, method=PLAIN)

    def callback(self) -> le.InnerOuterCallback | None:
        """Return ours."""
        seed = None if self.seed % 2 else self.seed
        return None if self.method == PLAIN else METHODS[self.method](self.inner_steps, seed)

    def fit(self, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
        """Train to the end, with every checkpoint kept in the folder, and return all that the end depends on.

        Args:
            folder: for checkpoints.
            checkpoint: to go on from.
        """
        module, ours = make_module(self), self.callback()
        torch.manual_seed(self.seed)
        keep = ModelCheckpoint(
            folder,
            "{epoch}-{step}",
            save_top_k=-1,
            every_n_train_steps=self.save or None,
            save_on_exception=self.save_on_exception,
        )
        callbacks: list[Any] = [ours] if ours else []
        callbacks.insert(0 if self.listener_first else len(callbacks), Listener())
        if self.batchnorm:
            callbacks.append(le.RefreshBatchNorm(2, dataloader=loader(seed=5)) if ours else Writer())
        automatic = self.module == "automatic"
        validates = self.validation != "none"
        t = trainer(
            folder,
            callbacks=[*callbacks, keep],
            enable_checkpointing=True,
            max_epochs=EPOCHS,
            max_steps=self.max_steps,
            limit_val_batches=2 if validates else 0,
            val_check_interval=5 if self.validation == "middle" else 1.0,
            accumulate_grad_batches=self.accumulate,
            gradient_clip_val=1.0 if automatic and self.seed % 3 == 0 else None,
        )
        batches: Any = Stream() if self.loader == "stream" else loader(shuffle=self.loader == "shuffled")
        t.fit(module, batches, loader(8) if validates else None, ckpt_path=checkpoint, weights_only=True)
        return {
            "module": dict(module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in t.optimizers],
            "loops": ours.state_dict().get("loops", []) if ours else [],
            "step": t.global_step,
        }


class KeptDropout(nn.Module):
    """Dropout from a generator of its own, whose place is in the module's state."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * 2.0 * (torch.rand(x.shape, generator=self.generator) < 0.5)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


class _Hooks:
    """What a user's module has, so that something can happen there."""

    schedule = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)  # type: ignore[misc]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return super().validation_step(batch, batch_idx)  # type: ignore[misc]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Nothing."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()  # type: ignore[misc]
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_module(training: Training) -> L.LightningModule:
    """Return a new module; its weights are the same every time."""
    kind = MODULES[training.module]
    hooked = type(kind.__name__, (_Hooks, kind), {"schedule": training.schedule})
    module: Any = hooked() if training.module == "pair" else hooked(training.optimizer)
    dropout = {"none": nn.Identity, "torch": lambda: nn.Dropout(0.5), "kept": KeptDropout}[training.dropout]()
    norm = nn.BatchNorm1d(6) if training.batchnorm else nn.Identity()
    module.net = nn.Sequential(module.net[0], norm, module.net[1], dropout, module.net[2])
    return module


class Listener(L.Callback):
    """A user's callback, for something to happen in."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Nothing."""


class Writer(L.Callback):
    """Writes BatchNorm statistics in a validation: what a resume makes of it without us."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        for norm in pl_module.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.fill_(trainer.global_step)
