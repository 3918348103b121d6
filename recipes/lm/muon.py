"""Muon for the matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Step groups with ``use_muon`` by ``torch.optim.Muon`` and the others by AdamW, at one learning rate.

    Muon's update is scaled to the root mean square of AdamW's (``adjust_lr_fn="match_rms_adamw"``), so that one
    learning rate, schedule and weight decay serve both, and a rate that works for AdamW is a start.

    Args:
        params: groups, each with ``use_muon``: true for groups of matrices, false for the others.
        lr: of both, >= 0.
        weight_decay: of both, decoupled, >= 0; a group may have its own.
        momentum: Muon's, Nesterov.
        betas: AdamW's.

    Raises:
        ImportError: torch has no Muon; it came with 2.9.
        ValueError: a group does not say whether it uses Muon, or uses it for what is no matrix (at the first step).

    References:
        Jordan et al., Muon, 2024; Liu et al., Muon is scalable for LLM training, 2025, arXiv:2502.16982.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"Muon needs torch >= 2.9, got {torch.__version__}: take torch.optim.AdamW")
        self._momentum, self._betas = momentum, betas
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which says whether it uses Muon."""
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError("every group of params must say use_muon, true or false, got one that does not")
        super().add_param_group(param_group)
        self._parts: dict[bool, Optimizer] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_momentum": self._momentum, "_betas": self._betas}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parts = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of both and return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon in (True, False):
            groups = [group for group in self.param_groups if group["use_muon"] is use_muon]
            if not groups:
                continue
            if use_muon not in self._parts:
                self._parts[use_muon] = self._make(use_muon, groups)
            part = self._parts[use_muon]
            # The groups and the state are ours, whatever has been loaded since.
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss

    def _make(self, use_muon: bool, groups: list[dict[str, Any]]) -> Optimizer:
        # torch writes the settings that a group has not into the group.
        if use_muon:
            return torch.optim.Muon(groups, momentum=self._momentum, adjust_lr_fn="match_rms_adamw")
        return AdamW(groups, betas=self._betas)
