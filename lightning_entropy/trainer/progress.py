"""Where a Trainer stands: whether a batch was the last, and at which step it logs."""

from typing import Any

from lightning.pytorch import Trainer

from lightning_entropy.trainer import lightning_internals


def training_is_complete(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch that has ended is the last of the fit, as far as that is known before a validation.

    Args:
        trainer: in ``on_train_batch_end``.
        batch_idx: of the batch.
    """
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    last_batch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return last_batch and epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs


def log_outer_step(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Log the metrics of an outer step and the effective epochs. Synchronizes with the device."""
    values = {key: float(value) for key, value in metrics.items()}
    if trainer.num_training_batches != float("inf"):
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        values["entropy/effective_epochs"] = batches / trainer.num_training_batches
    for logger in trainer.loggers:
        logger.log_metrics(values, step=lightning_internals.logger_step(trainer))
