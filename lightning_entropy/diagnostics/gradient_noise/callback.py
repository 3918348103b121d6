"""The gradient noise as a callback."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_entropy.diagnostics.callback import Diagnostic
from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.gradient_noise.estimator import gradient_noise
from lightning_entropy.diagnostics.gradient_noise.result import GradientNoiseResult


class GradientNoise(Diagnostic):
    """Log and draw the gradient noise: :func:`gradient_noise` as a callback, always in eval mode.

    Logged: ``gradient_noise/trace``, ``largest``, ``mean``, ``std``, ``clipped_mean``, ``clipped_std``,
    ``rank_percent`` (the talk's recipe), ``stable_rank``, ``participation``, ``gradient_squared``,
    ``noise_scale`` with its error, and ``temperature`` from the first optimizer's learning rate and the batch size.

    Args:
        chunk: Per-example gradients computed at once. None: as ``memory`` allows.
        memory: GiB for gradients.
        vectorize: False for modules that cannot run under ``vmap``.
        groups: Of examples, for the error that their choice makes, in the picture; 0: none.
        **when: When and on what to measure; see :class:`~lightning_entropy.diagnostics.callback.Diagnostic`.

    Raises:
        ValueError: If ``mode`` is "train": examples are not independent where BatchNorm mixes them.

    Example:
        >>> GradientNoise(every_n_epochs=5, examples=256).name
        'gradient_noise'
    """

    default_name = "gradient_noise"

    def __init__(
        self,
        *,
        chunk: int | None = None,
        memory: float = 2.0,
        vectorize: bool = True,
        groups: int = 0,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        if self.mode != "eval":
            raise ValueError(f'mode must be "eval" for gradients of single examples, got {self.mode!r}')
        self.chunk, self.memory, self.vectorize, self.groups = chunk, memory, vectorize, groups
        self._lr: float | None = None
        self._batch_size: int | None = None

    def _run(self, trainer: Any, pl_module: Any) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        self._lr = None if self._lr is None else float(self._lr)
        batch = getattr(trainer.train_dataloader, "batch_size", None)
        self._batch_size = batch and batch * trainer.accumulate_grad_batches * trainer.world_size
        super()._run(trainer, pl_module)

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> GradientNoiseResult:
        """Run :func:`gradient_noise` with the callback's settings."""
        del settings["mode"]
        return gradient_noise(
            module,
            data,
            lr=self._lr,
            batch_size=self._batch_size,
            chunk=self.chunk,
            memory=self.memory,
            vectorize=self.vectorize,
            groups=self.groups,
            **settings,
        )
