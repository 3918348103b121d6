"""The command line that the nets share: fit, validate, test and predict, by LightningCLI."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_entropy  # noqa: F401  registers the strategies, so that a config can name them
from recipes.classifier import Classifier
from recipes.data import ImageData


class RecipeCLI(LightningCLI):
    """LightningCLI with a checkpoint of the best and the last weights, a learning-rate monitor, and one seed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--checkpoint.*`` and ``--lr_monitor.*``, and give the data the seed of ``--seed_everything``."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val_accuracy",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.filename": "best-{epoch}-{val_accuracy:.4f}",
            }
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)


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
            "callbacks": [RichProgressBar()],
            "logger": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs"}},
        },
        **kwargs,
    )
