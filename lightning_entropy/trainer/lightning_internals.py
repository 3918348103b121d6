"""The private names of Lightning that this floor needs, in one place. Checked against lightning 2.6.4 to 2.6.6.

``tests/trainer/test_lightning_internals.py`` fails when one of them changes.
"""

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader


def logger_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs in a training batch: batches that stepped, whatever the optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """Run the hooks of a batch before it moves to the device, the module's or the datamodule's."""
    return module._on_before_batch_transfer(batch)


def without_iterator(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Copy a loader with persistent workers, whose iterator is the original's."""
    own = copy.copy(loader)
    own._iterator = None
    return own


def saves_a_folder(strategy: ModelParallelStrategy) -> bool:
    """Whether checkpoints are folders to which every rank writes its shards, or else files of the first rank."""
    return strategy._save_distributed_checkpoint
