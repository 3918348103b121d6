"""The command line that the nets share: fit, validate, test and predict, by LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_entropy  # noqa: F401  registers the strategies, so that a config can name them
from recipes.classifier import Classifier
from recipes.data import ImageData
from recipes.messages import explain, program
from recipes.predictions import WritePredictions


class Parser(LightningArgumentParser):
    """LightningCLI's, whose errors have no usage above them and name what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": program()} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with the message.

        Raises:
            SystemExit: with status 2; or jsonargparse's own error, for whoever has asked for it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, explain(message, getattr(ex, "subcommand_parser", None) or self))


class LastCheckpoint(ModelCheckpoint):
    """Save ``last.ckpt`` after every epoch, and again when Lightning's SWA has put its average in place."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the average: SWA puts it in place in an epoch without steps, which ModelCheckpoint skips."""
        super().on_train_end(trainer, pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.best_model_path and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            trainer.save_checkpoint(self.best_model_path)


class RecipeCLI(LightningCLI):
    """LightningCLI with checkpoints of the best and of the last epoch, a learning-rate monitor, and one seed.

    Configs name a net and a method, one file each. What depends on both is computed here unless it is given: the
    number of epochs, from ``effective_epochs`` of the net and ``passes_per_epoch`` of the method, and the folder of the
    run, from the files' names.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of budget, checkpoints and monitor, and pass ``--seed_everything`` on to the data."""
        parser.add_argument(
            "--effective_epochs",
            type=PositiveInt | None,
            default=None,
            help="passes over the images, counting every gradient evaluation of every replica; "
            "sets trainer.max_epochs where neither that nor trainer.max_steps is given",
        )
        parser.add_argument(
            "--passes_per_epoch",
            type=PositiveInt,
            default=1,
            help="effective epochs in an epoch: gradients per step (2 with SAM) times replicas",
        )
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

    def before_instantiate_classes(self) -> None:
        """Set the number of epochs and the name of the run, where they are not given."""
        config = self.config[self.subcommand]
        trainer = config.trainer
        if trainer.max_epochs is None and trainer.max_steps == -1 and config.effective_epochs:
            trainer.max_epochs = -(-config.effective_epochs // config.passes_per_epoch)  # rounded up
        files = [Path(file.relative).stem for file in config.config or []]
        if isinstance(trainer.logger, Namespace) and trainer.logger.init_args.get("name", "") is None and files:
            trainer.logger.init_args.name = "/".join(files)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the Trainer, without the learning-rate monitor where there is no logger."""
        trainer = super().instantiate_trainer(**kwargs)
        if not trainer.loggers:
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, LearningRateMonitor)]
        return trainer


def main(args: ArgsType = None) -> RecipeCLI:
    """Run the command line; the configs name the net.

    Args:
        args: arguments; None takes the command line's.
    """
    return RecipeCLI(
        Classifier,
        ImageData,
        args=args,
        parser_class=Parser,
        seed_everything_default=0,
        # A rerun into the same folder keeps the newer config.
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "callbacks": WritePredictions(),
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": None},
            },
        },
    )
