"""The Hessian's spectrum as a callback."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_entropy.diagnostics.callback import Diagnostic
from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.hessian.estimator import hessian_spectrum
from lightning_entropy.diagnostics.hessian.result import HessianResult


class HessianSpectrum(Diagnostic):
    """Log and draw the Hessian's spectrum: :func:`hessian_spectrum` as a callback.

    Logged: ``hessian/largest``, ``smallest``, ``trace``, ``trace_error``, ``near_zero_low``, ``near_zero_high`` and
    ``loss``. Costs about ``20 top + probes * steps`` Hessian-vector products, each three to four times a
    forward and backward pass over ``examples`` examples.

    Args:
        top: See :func:`hessian_spectrum`, as for the next four.
        bottom: How many of the smallest eigenvalues.
        probes: Random probes for trace and density.
        steps: Lanczos steps of each probe.
        dense_limit: With no more weights than this, the exact spectrum.
        memory: GiB for Lanczos vectors.
        groups: Of examples, for the error that their choice makes, logged as ``largest_error`` too; 0: none.
        **when: When, on what and how to measure; see :class:`~lightning_entropy.diagnostics.callback.Diagnostic`.

    Example:
        >>> HessianSpectrum(every_n_epochs=10, examples=512).name
        'hessian'
    """

    default_name = "hessian"

    def __init__(
        self,
        *,
        top: int = 5,
        bottom: int = 1,
        probes: int = 8,
        steps: int = 40,
        dense_limit: int = 1000,
        memory: float = 8.0,
        groups: int = 0,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        self.top, self.bottom, self.probes, self.steps = top, bottom, probes, steps
        self.dense_limit, self.memory, self.groups = dense_limit, memory, groups

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> HessianResult:
        """Run :func:`hessian_spectrum` with the callback's settings."""
        return hessian_spectrum(
            module,
            data,
            top=self.top,
            bottom=self.bottom,
            probes=self.probes,
            steps=self.steps,
            dense_limit=self.dense_limit,
            memory=self.memory,
            groups=self.groups,
            **settings,
        )
