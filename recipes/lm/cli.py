"""The command line of the language model."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from recipes.cli import Parser, RecipeCLI
from recipes.lm.data import TextData
from recipes.lm.module import LanguageModel
from recipes.lm.traffic import Traffic

# What is trained unless a config says otherwise.
DEFAULT = Path(__file__).parents[1] / "configs/lm/nets/gpt_1m.yaml"


class LanguageModelCLI(RecipeCLI):
    """The recipes' command line with a budget in tokens; the best checkpoint is that of the least ``val_loss``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the budget."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--tokens",
            type=PositiveInt | None,
            default=None,
            help="to train on, all replicas together; sets trainer.max_steps where neither that nor "
            "trainer.max_epochs is given",
        )
        parser.set_defaults(
            {
                "checkpoint.monitor": "val_loss",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best-{step}-{val_loss:.4f}",
            }
        )

    def before_instantiate_classes(self) -> None:
        """Set the number of steps and the name of the run, where they are not given."""
        config = self.config[self.subcommand]
        trainer, data = config.trainer, config.data
        if trainer.max_epochs is None and trainer.max_steps == -1 and config.tokens:
            per_step = data.batch_size * data.block_size * config.passes_per_epoch * trainer.accumulate_grad_batches
            trainer.max_steps = -(-config.tokens // per_step)  # rounded up
        super().before_instantiate_classes()
        logger = trainer.logger
        if isinstance(logger, Namespace) and logger.init_args.get("name", "") is None:
            logger.init_args.name = DEFAULT.stem


def main(args: ArgsType = None) -> LanguageModelCLI:
    """Run the command line; without a config it trains a GPT of a million weights on the standard library.

    Args:
        args: arguments; None takes the command line's.
    """
    return LanguageModelCLI(
        LanguageModel,
        TextData,
        args=args,
        parser_class=Parser,
        seed_everything_default=0,
        # A rerun into the same folder keeps the newer config.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={name: {"default_config_files": [str(DEFAULT)]} for name in LanguageModelCLI.subcommands()},
        trainer_defaults={
            "callbacks": Traffic(),
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": None},
            },
        },
    )
