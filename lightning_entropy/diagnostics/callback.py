"""What every diagnostic callback does: run when due, on the anchor, once, unnoticed by training; log and draw."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples, Layout, checked_examples
from lightning_entropy.diagnostics.figures import Result, draw, log_figure
from lightning_entropy.diagnostics.lightning_internals import logger_step
from lightning_entropy.diagnostics.loss import Loss


class Diagnostic(pl.Callback, ABC):
    """Measure the anchor x every so many epochs and at the end of training.

    Weights and buffers are read through ``pl_module.state_dict()``, which shows x whatever the optimizer is doing,
    and copied. Training does not notice: weights, gradients, BatchNorm buffers, train and eval flags and the random
    states stay bit-equal. With several processes the first one measures while the others wait (raise the process
    group's timeout if that takes longer than its 30 minutes); sharded strategies, whose ranks hold parts of the
    weights, are refused.

    A diagnostic that fails warns and lets the training go on.

    Numbers go to every logger of the trainer, under ``<name>/<number>`` at the step at which Lightning logs; figures to
    the loggers that take them (TensorBoard, Weights & Biases, MLflow, Comet), else to
    ``<log_dir>/diagnostics/<name>-step<n>.png``. ``result`` holds the latest result, on every rank.

    Args:
        every_n_epochs: Run after every n-th epoch, >= 1. None: only at the end.
        at_end: Run at the end of training, unless just run.
        data: "train" or "val" for the trainer's (first) loader of that name, or a loader of your own. A training
            set that augments is read through its augmentation, drawn once.
        loss: ``(module, batch) -> scalar``. None: cross entropy of ``module(x)`` and ``y``.
        examples: How many examples of the data, >= 1, the same ones each time; or a callable from a batch to its number
            of them, and all are taken. None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that they share.
        mode: "eval" or "train": the mode of BatchNorm and dropout while measuring.
        seed: Of everything that is drawn.
        figures: Draw.
        name: Prefix of the logged numbers. None: the diagnostic's own.

    Raises:
        ValueError: If an argument is out of range.
    """

    default_name = "diagnostic"

    def __init__(
        self,
        *,
        every_n_epochs: int | None = None,
        at_end: bool = True,
        data: str | Iterable[Batch] = "train",
        loss: Loss | None = None,
        examples: Examples = 1024,
        batch_dim: BatchDim = None,
        mode: str = "eval",
        seed: int = 0,
        figures: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be None or at least 1, got {every_n_epochs}")
        if isinstance(data, str) and data not in ("train", "val"):
            raise ValueError(f'data must be "train", "val" or a loader, got {data!r}')
        checked_examples(examples)
        Layout(batch_dim)
        if mode not in ("eval", "train"):
            raise ValueError(f'mode must be "eval" or "train", got {mode!r}')
        self.every_n_epochs, self.at_end, self.data = every_n_epochs, at_end, data
        self.loss, self.examples, self.batch_dim, self.mode, self.seed = loss, examples, batch_dim, mode, seed
        self.figures, self.name = figures, name or self.default_name
        self.result: Any = None
        self._measured_at: int | None = None

    @abstractmethod
    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> Result | None:
        """Run the estimator; None for nothing to say.

        ``settings`` are loss, examples, batch_dim, mode, seed, state, transfer and progress.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise MisconfigurationException for strategies that spread one model's weights over ranks."""
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"{type(self).__name__} needs the whole model on one device, got {type(trainer.strategy).__name__}: "
                "measure the checkpoint after training"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure if this epoch is due."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the last weights."""
        if self.at_end and self._measured_at != trainer.global_step:
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = pl_module.state_dict()
        self._once(
            trainer,
            lambda: self.measure(
                pl_module,
                self._data(trainer),
                loss=self.loss,
                examples=self.examples,
                batch_dim=self.batch_dim,
                mode=self.mode,
                seed=self.seed,
                state=state,
                transfer=trainer.strategy.batch_to_device,
                progress=trainer.progress_bar_callback is not None,
            ),
        )

    def _once(self, trainer: pl.Trainer, compute: Callable[[], Result | None]) -> None:
        """Compute on the first rank, share the result or the failure with all, log."""
        folder = Path(trainer.log_dir or trainer.default_root_dir, "diagnostics")  # A collective: all ranks ask.
        self._measured_at = trainer.global_step
        failure, result = None, None
        if trainer.is_global_zero:
            try:
                result = compute()
            except Exception as error:
                failure = error
        # Every rank leaves by the same door, so that none waits for one that has gone.
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        message, self.result = trainer.strategy.broadcast((message, result), src=0)
        if message is not None:  # a diagnostic never ends a training
            rank_zero_warn(f"{type(self).__name__} of {type(trainer.lightning_module).__name__} has failed: {message}")
        if trainer.is_global_zero and self.result is not None:
            self._log(trainer, self.result, folder)

    def _data(self, trainer: pl.Trainer) -> Iterable[Batch]:
        if not isinstance(self.data, str):
            return self.data
        loaders = trainer.train_dataloader if self.data == "train" else trainer.val_dataloaders
        if isinstance(loaders, dict):
            loaders = list(loaders.values())
        if isinstance(loaders, list | tuple):
            loaders = loaders[0] if loaders else None
        if loaders is None:
            raise MisconfigurationException(
                f'{type(self).__name__}(data="{self.data}") needs a {self.data} loader, and the trainer has none'
            )
        return loaders

    def _log(self, trainer: pl.Trainer, result: Result, folder: Path) -> None:
        step = logger_step(trainer)
        numbers = {f"{self.name}/{key}": float(value) for key, value in result.scalars().items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        if not self.figures or getattr(trainer, "fast_dev_run", False):
            return

        figure = draw(result)
        taken = [log_figure(logger, self.name, figure, step) for logger in trainer.loggers]
        if not any(taken):
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{self.name}-step{step:08d}.png", dpi=120)
