"""The private names of Lightning that the diagnostics need, in one place. Checked against lightning 2.6.4 to 2.6.6."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn


def logger_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs an epoch's end: of its last batch, whatever the optimizers."""
    return max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)


def trainers(module: nn.Module) -> list[Any]:
    """Return the Trainers that a module's LightningModules belong to, which a copy of it must not take along."""
    return [m._trainer for m in module.modules() if isinstance(m, LightningModule) and m._trainer is not None]
