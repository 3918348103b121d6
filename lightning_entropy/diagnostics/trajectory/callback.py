"""The path of the weights, recorded and analysed by a callback."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_entropy.diagnostics.callback import Diagnostic
from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.trajectory.estimator import LEAST_SNAPSHOTS, analyse_trajectory
from lightning_entropy.diagnostics.trajectory.result import TrajectoryResult


class Trajectory(Diagnostic):
    """Record the path of the weights and analyse it: :func:`analyse_trajectory` as a callback.

    What is recorded is what the optimizer walks: while training runs that is the inner iterate y of an inner-outer
    method, and the weights themselves otherwise. ``anchor=True`` records the anchor x instead. When the memory is full,
    every other snapshot is dropped and the interval doubled, so snapshots stay evenly spaced and take at most
    ``snapshots * weights`` numbers on the model's device. Recording resumes with a checkpoint.

    Logged: ``trajectory/current_significance`` and ``current_p_value``, ``control_significance``,
    ``correlation_time``, ``low_frequency_excess`` and ``gradient_norm`` (of mini-batches, after unscaling and before
    clipping, over sqrt(P)).

    Args:
        every_n_steps: Optimizer steps between snapshots, >= 1.
        start_step: Optimizer step of the first: discard the descent.
        weights: How many weights to watch, a fixed random choice, >= 2. None: all.
        snapshots: The most kept, >= 128.
        components: Principal components in whose planes to look for a current.
        anchor: Record x rather than y.
        **when: When to analyse; see :class:`~lightning_entropy.diagnostics.callback.Diagnostic`. No data is read.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Trajectory(every_n_steps=10, weights=100).name
        'trajectory'
    """

    default_name = "trajectory"

    def __init__(
        self,
        *,
        every_n_steps: int = 1,
        start_step: int = 0,
        weights: int | None = 1000,
        snapshots: int = 2000,
        components: int = 4,
        anchor: bool = False,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if weights is not None and weights < 2:
            raise ValueError(f"weights must be None or at least 2, got {weights}")
        if snapshots < 2 * LEAST_SNAPSHOTS:  # Half remain when the memory was full.
            raise ValueError(f"snapshots must be at least {2 * LEAST_SNAPSHOTS}, got {snapshots}")
        self.every_n_steps, self.start_step, self.weights = every_n_steps, start_step, weights
        self.snapshots, self.components, self.anchor = snapshots, components, anchor
        self._interval = every_n_steps
        self._steps: list[int] = []
        self._path: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._norm: Tensor | None = None
        self._chosen: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Two of them may share a trainer under two names."""
        return f"Trajectory{{'name': {self.name!r}}}"

    @property
    def path(self) -> Tensor:
        """The snapshots so far, shape (n, d)."""
        return torch.stack(self._path) if self._path else torch.empty(0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the recording, so that it goes on after a resume."""
        norms = torch.stack(self._norms).cpu() if self._norms else torch.empty(0)
        return {"interval": self._interval, "steps": list(self._steps), "path": self.path.cpu(), "norms": norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a recording."""
        self._interval, self._steps = state_dict["interval"], list(state_dict["steps"])
        self._path, self._norms = list(state_dict["path"]), list(state_dict["norms"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights to watch."""
        named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("module must have a trainable weight (requires_grad=True), got none")
        sizes = [p.numel() for p in named.values()]
        total = sum(sizes)
        if self.weights is None or self.weights >= total:
            indices = torch.arange(total)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            indices = torch.randperm(total, generator=generator)[: self.weights].sort().values
        self._chosen, offset = {}, 0
        for (name, p), size in zip(named.items(), sizes, strict=True):
            mine = indices[(indices >= offset) & (indices < offset + size)] - offset
            if len(mine):
                self._chosen[name] = mine.to(p.device)
            offset += size
        device = next(iter(named.values())).device
        self._path, self._norms = [p.to(device) for p in self._path], [n.to(device) for n in self._norms]

    def _due(self, trainer: pl.Trainer, step: int) -> bool:
        after = step - self.start_step
        return trainer.is_global_zero and after >= 0 and after % self._interval == 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the mini-batch gradient's norm where a snapshot follows."""
        if self._due(trainer, trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            count = sum(g.numel() for g in gradients)
            if count:
                norms = torch.stack([g.detach().float().norm() for g in gradients])
                self._norm = norms.norm() / math.sqrt(count)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if one is due."""
        step = trainer.global_step
        if not self._due(trainer, step) or (self._steps and self._steps[-1] >= step):
            return
        source = pl_module.state_dict() if self.anchor else dict(pl_module.named_parameters())
        parts = [source[name].detach().flatten()[chosen].float() for name, chosen in self._chosen.items()]
        self._steps.append(step)
        self._path.append(torch.cat(parts))
        self._norms.append(self._norm if self._norm is not None else self._path[-1].new_tensor(math.nan))
        if len(self._steps) >= self.snapshots:
            self._interval *= 2
            kept = [i for i, s in enumerate(self._steps) if (s - self.start_step) % self._interval == 0]
            self._steps = [self._steps[i] for i in kept]
            self._path, self._norms = [self._path[i] for i in kept], [self._norms[i] for i in kept]

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._once(trainer, lambda: self.measure(pl_module, ()))

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> TrajectoryResult | None:
        """Analyse the recording; warn and return None while it is too short."""
        if len(self._path) < LEAST_SNAPSHOTS:
            rank_zero_warn(
                f"Trajectory needs at least {LEAST_SNAPSHOTS} snapshots, got {len(self._path)}: nothing to analyse yet"
            )
            return None
        norms = torch.stack(self._norms).cpu().numpy()
        return analyse_trajectory(
            self.path,
            interval=self._interval,
            components=self.components,
            gradient_norms=() if np.isnan(norms).any() else norms,
            seed=self.seed,
        )
