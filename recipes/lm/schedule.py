"""Warm-up, stable, decay: the schedule that knows its end only when it comes to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupStableDecay:
    """Scale the learning rate by a linear warm-up, a plateau and a linear decay, by the share of training done.

    Attributes:
        warmup: share of training to reach the full rate, in [0, 1).
        decay: share of training at its end in which the rate falls, in [0, 1 - warmup].
        final: the scale at the end, in [0, 1].

    Raises:
        ValueError: if an attribute is out of its range.

    Example:
        >>> schedule = WarmupStableDecay(warmup=0.2, decay=0.4)
        >>> [round(schedule(progress), 2) for progress in (0.0, 0.1, 0.2, 0.6, 0.8, 1.0)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]

    References:
        Hu et al., MiniCPM, 2024, arXiv:2404.06395, section 4.
    """

    warmup: float = 0.0
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.decay <= 1 - self.warmup:
            raise ValueError(f"decay must be in [0, {1 - self.warmup:g}], what the warm-up leaves, got {self.decay}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final}")

    def __call__(self, progress: float) -> float:
        """Return the scale at ``progress`` in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        left = 1 - min(progress, 1.0)
        if left >= self.decay:
            return 1.0
        return self.final + (1 - self.final) * left / self.decay
