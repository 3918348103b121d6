"""The LightningModule of the recipes: a net, cross entropy, any optimizer, and SAM's two-gradient step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from recipes.limits import check

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cosine:
    """Scale the learning rate by a linear warm-up and half a cosine, as a function of the share of training done.

    Attributes:
        warmup: share of training to reach the full rate, in [0, 1).
        final: the scale at the end, in [0, 1].

    Raises:
        ValueError: if an attribute is out of its range.

    Example:
        >>> [round(Cosine(warmup=0.5)(progress), 2) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final}")

    def __call__(self, progress: float) -> float:
        """Return the scale at ``progress`` in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        done = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Drops:
    """Scale the learning rate down at given shares of training, the papers' schedule.

    Attributes:
        at: shares of training, increasing, in (0, 1).
        factor: what each drop multiplies by, in (0, 1].

    Raises:
        ValueError: if an attribute is out of its range.

    Example:
        >>> [round(Drops(at=(0.3, 0.6), factor=0.2)(progress), 2) for progress in (0.0, 0.3, 0.9)]
        [1.0, 0.2, 0.04]
    """

    at: tuple[float, ...]
    factor: float = 0.2

    def __post_init__(self) -> None:
        if list(self.at) != sorted(self.at) or not all(0 < share < 1 for share in self.at):
            raise ValueError(f"at must increase within (0, 1), got {self.at}")
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {self.factor}")

    def __call__(self, progress: float) -> float:
        """Return the scale at ``progress`` in [0, 1]."""
        return self.factor ** sum(progress >= share for share in self.at)


@dataclass(frozen=True)
class Piecewise:
    """Return one number for each stretch of outer steps, as the papers' outer learning rates have it.

    Attributes:
        values: one more than ``at``.
        at: the outer steps t at which the next value begins, increasing, > 0.

    Raises:
        ValueError: if the lengths do not fit, ``at`` does not increase or a value is not finite.

    Example:
        >>> [Piecewise(values=(1.0, 0.2), at=(10,))(t) for t in (0, 9, 10)]
        [1.0, 1.0, 0.2]
    """

    values: tuple[float, ...]
    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(f"values must be one more than at, got {len(self.values)} and {len(self.at)}")
        if any(a >= b for a, b in zip((0, *self.at), self.at, strict=False)):
            raise ValueError(f"at must increase from above 0, got {self.at}")
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"values must be finite, got {self.values}")

    def __call__(self, t: int) -> float:
        """Return the value at outer step ``t``."""
        return self.values[sum(t >= step for step in self.at)]


class Classifier(L.LightningModule):
    """Train a net to classify images.

    Logs ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``;
    predicts class probabilities [n, num_classes].

    Args:
        net: maps images [n, channels, height, width] to logits [n, num_classes].
        optimizer: makes the optimizer from the parameters.
        schedule: scales its learning rate, from the share of training done in [0, 1]; None keeps it constant.
        num_classes: of the net and the data.
        label_smoothing: share of a label's weight spread over all classes, in [0, 1). For training only.
        sharpness: SAM's rho, the radius in weight space of the step uphill, in [0, 1000]; 0 is the optimizer alone. A
            step then costs two gradient evaluations, both on the same batch.
        sharpness_start: share of the training after which SAM begins, in [0, 1); before it a step is the optimizer's.
        channels_last: lay out convolutions' weights and images channel after pixel, which is faster on most devices.
        compile: compile the net with ``torch.compile``.

    Raises:
        ValueError: if ``sharpness``, ``sharpness_start`` or ``label_smoothing`` is out of its range.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        *,
        schedule: Callable[[float], float] | None = None,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        sharpness: float = 0.0,
        sharpness_start: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check("sharpness", sharpness, 0, 1000)
        if not 0 <= sharpness_start < 1:
            raise ValueError(f"sharpness_start must be in [0, 1), got {sharpness_start}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.memory_format)
        self.optimizer = optimizer
        self.schedule = schedule
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.sharpness = sharpness
        self.sharpness_start = sharpness_start
        self.compile_net = compile
        # SAM under automatic optimization would perturb by the previous batch's gradient: its step is written out.
        self.automatic_optimization = not sharpness
        self.accuracy = nn.ModuleDict(
            {f"{stage}_accuracy": _accuracy(num_classes) for stage in ("train", "val", "test")}
        )

    def setup(self, stage: str) -> None:
        """Check the data against the net, and compile.

        Raises:
            ValueError: if the data has another number of classes, or the net takes images of other channels.
        """
        classes = getattr(self.trainer.datamodule, "classes", None)
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(f"num_classes must be that of the data, {len(classes)}, got {self.num_classes}")
        shape = getattr(self.trainer.datamodule, "shape", None)
        first = next((m for m in self.net.modules() if isinstance(m, nn.Conv2d)), None)
        if shape is not None and first is not None and first.in_channels != shape[0]:
            raise ValueError(f"net must take images of the data's {shape[0]} channels, got one for {first.in_channels}")
        if self.compile_net:
            # In place: the names in the state_dict stay.
            self.net.compile()
            self.compile_net = False

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.net(images.contiguous(memory_format=self.memory_format))

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer, SAM around it if asked for, and its schedule by the step.

        Raises:
            MisconfigurationException: if SAM meets float16, whose gradient scaler has no place for its second
            gradient.
        """
        if not self.sharpness:
            optimizer = self.optimizer(self.parameters())
        elif self.trainer.precision == "16-mixed":
            raise MisconfigurationException("SAM needs precision 32-true or bf16-mixed, got 16-mixed")
        else:
            optimizer = LateSAM(self.parameters(), self.optimizer, rho=self.sharpness)
        if self.schedule is None:
            return {"optimizer": optimizer}
        steps = self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, partial(_scale, self.schedule, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss, or with SAM take the whole step."""
        if not self.sharpness:
            return self._train_loss(batch)
        self._sam_step(batch)
        return None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities [n, num_classes]."""
        return self(batch[0]).softmax(1)

    def _train_loss(self, batch: Batch) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = self.accuracy["train_accuracy"]
        accuracy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", accuracy, on_step=False, on_epoch=True)
        return loss

    def _sam_step(self, batch: Batch) -> None:
        """Take one step of SAM, w <- w - lr g(w + rho g(w) / |g(w)|), both gradients g on this batch.

        Foret et al., Sharpness-Aware Minimization, ICLR 2021, Algorithm 1.

        BatchNorm's running statistics learn from the first pass alone: those of the perturbed weights are not the
        net's.
        """
        optimizer = self.optimizers()
        start = self.sharpness_start * self.trainer.estimated_stepping_batches
        optimizer.optimizer.begun = self.trainer.global_step >= start
        optimizer.zero_grad()
        self.manual_backward(self._train_loss(batch))

        def uphill() -> Tensor:
            images, labels = batch
            with frozen_statistics(self.net):
                loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
            self.manual_backward(loss)
            return loss

        # Perturbs by the gradient that is there, clears it, calls uphill, restores the weights and steps.
        optimizer.step(closure=uphill)
        scheduler = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = self.accuracy[f"{stage}_accuracy"]
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)


class LateSAM(SAM):
    """SAM that takes the plain optimizer's step, of one gradient, as long as ``begun`` is not set."""

    begun = True

    def step(self, closure: Any = None) -> Any:
        """Step by the gradient that is there; once begun, by that of the perturbed weights, which the closure takes."""
        return super().step(closure) if self.begun else self.base_optimizer.step()


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch, as in training, and leave its running statistics and counter untouched.

    Example:
        >>> net = nn.BatchNorm1d(1).train()
        >>> with frozen_statistics(net):
        ...     net(torch.tensor([[1.0], [3.0]])).flatten().round().tolist(), net.running_mean.item()
        ([-1.0, 1.0], 0.0)
        >>> net.track_running_stats
        True
    """
    layers = tracking(net)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def tracking(net: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers that keep running statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in net.modules() if isinstance(module, kinds) and module.track_running_stats]


def _scale(schedule: Callable[[float], float], steps: float, step: int) -> float:
    return schedule(step / steps)


def _accuracy(num_classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, average="micro")
