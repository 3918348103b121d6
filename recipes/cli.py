"""The command line that the nets share: fit, validate, test and predict, by LightningCLI."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_entropy  # noqa: F401  registers the strategies, so that a config can name them
from recipes.classifier import Classifier
from recipes.data import ImageData
from recipes.predictions import WritePredictions


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``, of the last epoch. With Lightning's SWA it is written again when its average is in place."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the average, which SWA puts in place in an epoch without steps, where ModelCheckpoint sees no news."""
        super().on_train_end(trainer, pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.best_model_path and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            trainer.save_checkpoint(self.best_model_path)


class RecipeCLI(LightningCLI):
    """LightningCLI with checkpoints of the best and of the last epoch, a learning-rate monitor, and one seed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of checkpoints and monitor, and give the data the seed of ``--seed_everything``."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val_accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best-{epoch}-{val_accuracy:.4f}",
                # Not save_last, which copies the best one when it is written.
                "last_checkpoint.filename": "last",
                "last_checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, RichProgressBar()]
        if config.get("logger") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        return super()._instantiate_trainer(config, [*callbacks, WritePredictions()])


def main(net: str, args: ArgsType = None, **kwargs: Any) -> RecipeCLI:
    """Run the command line.

    Args:
        net: class path of the net trained unless the config names another.
        args: arguments; None takes the command line's.
        **kwargs: to ``RecipeCLI``.
    """
    return RecipeCLI(
        Classifier,
        ImageData,
        args=args,
        seed_everything_default=0,
        # A rerun into the same folder keeps the newer config.
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs"}},
        },
        **kwargs,
    )
