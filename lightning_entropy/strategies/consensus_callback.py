"""The callback that shows the consensus at events for which a strategy has no hook."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer


class ShowConsensus(Callback):
    """Show the consensus at events for which Strategy has no hook, or too late a one. Must be the first callback.

    Args:
        show: puts the consensus into the module.
    """

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the consensus to the callbacks that follow."""
        self._show()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the consensus in the module."""
        self._show()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave in the module as much of the consensus as is known without the other ranks."""
        self._show()
