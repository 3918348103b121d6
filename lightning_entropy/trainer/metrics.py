"""The metrics of outer steps on their way to the loggers: they come from the device, which is not waited for."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_entropy.trainer import lightning_internals


class Event(Protocol):
    """A point in the work of a device, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""


def to_host(value: Tensor) -> tuple[Tensor, Event | None]:
    """Copy a scalar to the host.

    Returns:
        The copy, and the event that it is made where the host need not wait for it; None: it has waited.
    """
    value = value.detach()
    if not value.is_cuda:
        return value.cpu(), None
    copy = value.to("cpu", non_blocking=True)  # to pinned memory, or it would be waited for
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    return copy, event


@dataclass
class _Row:
    """The metrics of one outer step."""

    step: int
    values: dict[str, Any]
    events: list[Event]


class OuterStepMetrics:
    """Write the metrics of outer steps to the Trainer's loggers, each with the step that it is of.

    A value on a CUDA device is copied when the device gets there, and written at the beginning of the first batch that
    finds it copied, or when :meth:`flush` is called: before the next row, a validation and the end of an epoch. Values
    that are on the CPU are written at once.

    Args:
        trainer: whose loggers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._row: _Row | None = None

    def log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of an outer step that was taken in this batch, and the effective epochs.

        Args:
            metrics: numbers and scalar tensors, by name.
        """
        self.flush()
        values: dict[str, Any] = {}
        events: list[Event] = []
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                values[name], event = to_host(value)
                events += [] if event is None else [event]
            else:
                values[name] = value
        if self._trainer.num_training_batches != float("inf"):
            batches = self._trainer.fit_loop.epoch_loop.total_batch_idx + 1
            values["entropy/effective_epochs"] = batches / self._trainer.num_training_batches
        self._row = _Row(lightning_internals.logger_step(self._trainer), values, events)
        self.poll()

    def poll(self) -> None:
        """Write what has arrived."""
        if self._row is not None and all(event.query() for event in self._row.events):
            self._write()

    def flush(self) -> None:
        """Write what there is, and wait for what has not arrived: of a loop before, it has."""
        if self._row is not None:
            for event in self._row.events:
                event.synchronize()
            self._write()

    def _write(self) -> None:
        row, self._row = self._row, None
        assert row is not None
        values = {name: float(value) for name, value in row.values.items()}
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=row.step)
