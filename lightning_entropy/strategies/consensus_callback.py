"""The callbacks through which a strategy acts at moments for which it has no hook, or too late a one."""

from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer


class ConsensusOwner(Protocol):
    """A strategy that has a consensus to show."""

    def show_consensus(self) -> None:
        """Put the consensus into the module. A collective."""

    def training_batch_ended(self, batch_idx: int) -> None:
        """Act after a training batch, before any other callback does."""

    def training_epoch_ended(self) -> None:
        """Act after a training epoch, before any other callback does."""

    def training_ended(self) -> None:
        """Act after the last epoch, before any other callback does."""


class ShowConsensus(Callback):
    """Show the consensus, and end the training, before every other callback looks. Must be the first callback.

    Args:
        owner: the strategy.
    """

    def __init__(self, owner: ConsensusOwner) -> None:
        self._owner = owner

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the strategy end the training, if this was the last batch."""
        self._owner.training_batch_ended(batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the consensus; the strategy's own hook, which is the last, hides it."""
        self._owner.show_consensus()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the consensus to the callbacks that follow."""
        self._owner.training_epoch_ended()
        self._owner.show_consensus()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the consensus in the module."""
        self._owner.training_ended()
        self._owner.show_consensus()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave in the module as much of the consensus as is known without the other ranks."""
        self._owner.show_consensus()
