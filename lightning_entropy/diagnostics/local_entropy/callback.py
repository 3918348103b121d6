"""Local entropy and the flatness profile as a callback."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_entropy.diagnostics.callback import Diagnostic
from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.local_entropy.estimator import local_entropy
from lightning_entropy.diagnostics.local_entropy.result import LocalEntropyResult


class LocalEntropy(Diagnostic):
    """Log and draw local entropy and the flatness profile: :func:`local_entropy` as a callback.

    Logged: ``local_entropy/rise`` with ``rise_error``, ``gradient_norm``, ``acceptance``, ``loss`` and the profile as
    ``rise_at_sigma_<sigma>``. A rung costs ``chains * leaps * (samples + warmup)`` gradients over the examples, and
    there are about log2(curvature / gamma) rungs.

    Args:
        gamma: See :func:`local_entropy`, as for the rest.
        temperature: T.
        sigmas: Grid of the flatness profile.
        samples: Proposals of a chain at each rung.
        warmup: Proposals before them.
        chains: Independent chains.
        leaps: Gradients for a proposal.
        draws: Pairs for each sigma.
        groups: Of examples, for the error that their choice makes; 0: none.
        **when: When, on what and how to measure; see :class:`~lightning_entropy.diagnostics.callback.Diagnostic`.

    Example:
        >>> LocalEntropy(gamma=10.0, examples=128).name
        'local_entropy'
    """

    default_name = "local_entropy"

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        temperature: float = 1e-4,
        sigmas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03),
        samples: int = 20,
        warmup: int = 10,
        chains: int = 4,
        leaps: int = 4,
        draws: int = 8,
        groups: int = 0,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        self.gamma, self.temperature, self.sigmas = gamma, temperature, tuple(sigmas)
        self.samples, self.warmup, self.chains, self.leaps, self.draws = samples, warmup, chains, leaps, draws
        self.groups = groups

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> LocalEntropyResult:
        """Run :func:`local_entropy` with the callback's settings."""
        return local_entropy(
            module,
            data,
            gamma=self.gamma,
            temperature=self.temperature,
            sigmas=self.sigmas or None,
            samples=self.samples,
            warmup=self.warmup,
            chains=self.chains,
            leaps=self.leaps,
            draws=self.draws,
            groups=self.groups,
            **settings,
        )
