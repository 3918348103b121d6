"""What a training has seen and what it has sent."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import lightning_entropy as le


class Traffic(Callback):
    """Log ``tokens`` (trained on, by all ranks), ``effective_passes`` (over the text) and ``bytes_sent`` (by a rank).

    The bytes are of this fit: those that :class:`lightning_entropy.ElasticEntropyStrategy` counts, or what a ring
    needs for DDP's float32 gradients, 2 (n - 1) / n of them at each step of n ranks. One process sends none.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Log."""
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        tokens = batches * batch[:, 1:].numel() * trainer.world_size
        text = trainer.datamodule.train_text  # type: ignore[attr-defined]
        values = {"tokens": tokens, "effective_passes": tokens / len(text), "bytes_sent": bytes_sent(trainer)}
        pl_module.log_dict({name: float(value) for name, value in values.items()})


def bytes_sent(trainer: L.Trainer) -> float:
    """Return the bytes that this rank has sent to others in this fit so far."""
    strategy, ranks = trainer.strategy, trainer.world_size
    if isinstance(strategy, le.ElasticEntropyStrategy):
        return strategy.bytes_sent
    if isinstance(strategy, DDPStrategy):
        weights = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
        return trainer.global_step * 2 * (ranks - 1) / ranks * 4 * weights
    return 0.0
