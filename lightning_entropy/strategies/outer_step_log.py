"""What is logged at outer steps, and when."""

from lightning.pytorch import Trainer

from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.trainer.metrics import OuterStepMetrics


class OuterStepLog:
    """Log outer steps, not more often than the Trainer's ``log_every_n_steps``, with what was sent since the last time.

    Args:
        trainer: whose loggers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._metrics = OuterStepMetrics(trainer)
        self.poll, self.flush = self._metrics.poll, self._metrics.flush
        self._last = (trainer.global_step, 0.0, 0.0)  # at the last log: global step, bytes sent, seconds waited

    @property
    def due(self) -> bool:
        """Whether the outer step of the batch that begins, if it has one, is to be logged."""
        every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(self._trainer.loggers) and 0 < every <= self._trainer.global_step + 1 - self._last[0]

    def begin(self, loops: ReplicaLoops) -> None:
        """Let the loops measure what is logged of the outer step of the batch that begins."""
        due = self.due
        for loop in loops.loops.loops:
            loop.measure = due
            loop.distances = None

    def write(self, loops: ReplicaLoops) -> None:
        """Log an outer step's metrics, the largest exchange, and the traffic per training step since the last log."""
        now = (self._trainer.global_step + 1, *loops.traffic())
        steps, sent, waited = (new - old for new, old in zip(now, self._last, strict=True))
        metrics = loops.metrics()
        metrics["entropy/bytes_per_step"] = sent / max(steps, 1)
        metrics["entropy/peak_bytes"] = loops.peak()
        metrics["entropy/seconds_waited"] = waited / max(steps, 1)
        self._metrics.log(metrics)
        self._last = now
