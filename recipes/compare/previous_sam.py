"""SAM at one gradient a step: uphill along the gradient of the batch before, which a training has anyway."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer


class PreviousSAM(Callback):
    """Take every gradient at w + rho g / |g|, with the gradient g of the step before, and step along it at w.

    It is what SAM's packages do under automatic optimization, where the gradient that their step finds is of a batch
    that is over. For comparison alone: one optimizer, no accumulation, and its direction is in no checkpoint.

    Args:
        rho: radius in weight space, > 0.

    References:
        Foret et al., Sharpness-aware minimization, ICLR 2021, arXiv:2010.01412; Ji et al., A single-step,
        sharpness-aware minimization is all you need, NeurIPS 2024.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.uphill: list[Tensor] = []  # the gradients of the step before
        self.kept: list[Tensor] = []  # the weights, while others are in their place

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go uphill."""
        params = _trained(pl_module)
        if len(self.uphill) < len(params):
            return
        self.kept = [p.clone() for p in params]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.uphill)))
        torch._foreach_add_(params, torch._foreach_mul(self.uphill, self.rho / length.clamp(min=1e-12)))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Come back, and remember the gradient."""
        params = _trained(pl_module)
        if self.kept:
            torch._foreach_copy_(params, self.kept)
            self.kept = []
        self.uphill = [p.grad.clone() for p in params if p.grad is not None]


def _trained(module: L.LightningModule) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]
