"""The callbacks through which a strategy acts at moments for which it has no hook, or too late a one."""

from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.lightning_internals import asks_every_batch, put_first, put_last


class ConsensusOwner(Protocol):
    """A strategy that has a consensus to show."""

    def show_consensus(self) -> None:
        """Put the consensus into the module. A collective."""

    def training_begins(self) -> None:
        """Act before the first batch of training or of its sanity check."""

    def training_batch_started(self) -> None:
        """Act before a training batch, before any other callback does."""

    def batch_is_over(self) -> None:
        """Act after a training batch, after all other callbacks."""

    def check_stop(self) -> None:
        """Stop this rank if it has waited too long for the others to stop with it."""

    def failed(self, exception: BaseException) -> None:
        """Tell the other ranks why this one leaves."""

    def training_batch_ended(self, batch_idx: int) -> None:
        """Act after a training batch, before any other callback does."""

    def training_epoch_ended(self) -> None:
        """Show the consensus after a training epoch, before any other callback looks."""

    def training_ended(self) -> None:
        """Act after the last epoch, before any other callback does."""


class ShowConsensus(Callback):
    """Show the consensus, and end the training, before every other callback looks. Must be the first callback.

    Args:
        owner: the strategy.
    """

    def __init__(self, owner: ConsensusOwner) -> None:
        self._owner = owner

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the strategy take charge of signals."""
        self._owner.training_begins()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the strategy take charge of signals."""
        self._owner.training_begins()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the strategy that a batch begins."""
        self._owner.training_batch_started()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let a rank stop that waits for the others to stop with it."""
        self._owner.check_stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the strategy end the training, if this was the last batch."""
        self._owner.training_batch_ended(batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the consensus; the strategy's own hook, which is the last, hides it."""
        self._owner.show_consensus()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the strategy show the consensus to the callbacks that follow."""
        self._owner.training_epoch_ended()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the consensus in the module."""
        self._owner.training_ended()
        self._owner.show_consensus()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave in the module as much of the consensus as is known without the other ranks."""
        self._owner.failed(exception)
        self._owner.show_consensus()


class AfterCallbacks(Callback):
    """Tell the strategy that all other callbacks have seen the end of a batch. Must be the last callback.

    Args:
        owner: the strategy.
    """

    def __init__(self, owner: ConsensusOwner) -> None:
        self._owner = owner

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the strategy act after all others."""
        self._owner.batch_is_over()


def put_around(trainer: Trainer, owner: ConsensusOwner, *, together: bool) -> None:
    """Let a strategy act before all callbacks of a Trainer, and after them where replicas stop together.

    Args:
        trainer: whose callbacks.
        owner: the strategy.
        together: there are several replicas in this job.

    Raises:
        MisconfigurationException: a callback would put other weights in the place of the consensus.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(callback).__name__} would put the average of one replica's inner weights in the place of "
                f"the consensus of {type(owner).__name__}: remove one of them"
            )
    put_first(trainer, ShowConsensus(owner))
    if not together:
        return
    put_last(trainer, AfterCallbacks(owner))
    if any(map(asks_every_batch, callbacks)):
        rank_zero_warn(
            "ModelCheckpoint(train_time_interval=...) asks all ranks every batch, which ties the replicas "
            "to each other: every_n_train_steps does not"
        )


def acts(trainer: Trainer) -> bool:
    """Whether a strategy acts among a Trainer's callbacks; in a finder's trial, of the plain optimizer, it does not."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, ShowConsensus) for callback in callbacks)
