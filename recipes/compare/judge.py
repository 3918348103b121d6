"""Judge the weights that a method would keep, at the end and whenever the Trainer validates."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from recipes.compare.measure import calibration_error, corrupted, error_and_loss, loss_rise, pruned, reestimated
from recipes.data import ImageData
from recipes.data.cache import write
from recipes.data.plan import EvaluationPlan

ROBUSTNESS = ("calibration_error", "corrupted_error", "pruned_error")


class Judge:
    """Measure weights on fixed images, the same for every method, with running and with re-estimated statistics.

    Args:
        data: set up.
        device: where.
        precision: of the Trainer.
        eval_images: most held-out images in a point of the curve, and most training images in any evaluation.
        refresh_images: training images that BatchNorm's statistics are re-estimated on.
    """

    def __init__(
        self, data: ImageData, *, device: torch.device, precision: str, eval_images: int, refresh_images: int
    ) -> None:
        self.data = data
        self.device = device
        self.precision = precision
        # The data module mixes training and held-out images, whatever the order of the files.
        self.train = data.train_indices[:eval_images]
        self.refresh = data.train_indices[:refresh_images]
        self.val = data.val_indices[:eval_images]
        # Test images are in the order of the files: in a folder of images, class by class.
        self.some = spread(data.test_indices, len(self.val) or len(data.test_indices))

    def point(self, module: L.LightningModule) -> dict[str, float]:
        """Measure the error on the held-out images, in per cent."""
        return self._errors(module, {"val": self.val})

    def final(self, module: L.LightningModule) -> dict[str, float]:
        """Measure errors on held-out, test and training images, the rise of the training loss under noise, and more.

        That is the calibration error on the test images, and on some of them the error with corrupted images and with
        a part of the weights, each in per cent.
        """
        images = {"val": self.val, "test": self.data.test_indices, "train": self.train}
        return self._errors(module, images, whole=True)

    @staticmethod
    def diverged() -> dict[str, float]:
        """Return the keys of :meth:`final` with nan for each: the result of a net whose weights have diverged."""
        names = [f"{name}_{what}" for name in ("val", "test", "train") for what in ("error_running", "error", "loss")]
        return dict.fromkeys([*names, "loss_rise", *ROBUSTNESS], math.nan)

    def _errors(self, module: L.LightningModule, images: dict[str, Tensor], whole: bool = False) -> dict[str, float]:
        """Measure with the statistics that training left, then with others, re-estimated once for all images."""
        with self._precision():
            result = {f"{name}_error_running": self._error(module, at)[0] for name, at in images.items()}
            with reestimated(module, self._batches(self.refresh)):
                for name, at in images.items():
                    result[f"{name}_error"], result[f"{name}_loss"] = self._error(module, at)
                if whole:
                    result["loss_rise"] = loss_rise(module, self._batches(self.train[:1000]))
                    result |= zip(ROBUSTNESS, self._robustness(module), strict=True)
        return result

    def _robustness(self, module: L.LightningModule) -> tuple[float, float, float]:
        calibration = calibration_error(module, self._batches(self.data.test_indices), len(self.data.classes))
        corrupt = error_and_loss(module, corrupted(self._batches(self.some)))[0]
        with pruned(module):
            return calibration, corrupt, self._error(module, self.some)[0]

    def _error(self, module: L.LightningModule, indices: Tensor) -> tuple[float, float]:
        return error_and_loss(module, self._batches(indices))

    def _batches(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        plan = EvaluationPlan(indices, batch_size=self.data.eval_batch_size, crop=self.data.crop)
        for batch in range(len(plan)):
            yield self.data.materialise(plan[batch].to(self.device))

    def _precision(self) -> torch.autocast:
        # Its cache would keep rounded weights through the noise on them.
        half = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def spread(indices: Tensor, count: int) -> Tensor:
    """Return at most ``count`` of the indices [n], evenly spread over their order.

    Example:
        >>> spread(torch.arange(10), 4)
        tensor([0, 2, 5, 7])
    """
    count = min(count, len(indices))
    return indices[torch.arange(count) * len(indices) // max(count, 1)]


class Recorder(Callback):
    """Count gradients, time the training without the measurements, and measure whenever the Trainer validates.

    A Trainer's validation is when every callback and strategy shows the weights it would keep. Replicas have the
    same weights then, and rank 0 measures.

    The first batch is not timed: a compiled net is compiled there.

    Args:
        judge: measures.
        path: where rank 0 writes the curve when training ends.
        batch_size: images of a gradient evaluation.
        keep_best: put back, at the end, the weights of the point of least held-out error.
    """

    def __init__(self, judge: Judge, path: Path, batch_size: int, *, keep_best: bool = False) -> None:
        self.judge = judge
        self.path = path
        self.batch_size = batch_size
        self.keep_best = keep_best
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.gradients = 0
        self.curve: dict[int, dict[str, float]] = {}
        self._seconds = 0.0
        self._since = 0.0
        self._untimed: int | None = None  # gradients before the clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count every gradient of the first weight."""
        next(p for p in pl_module.parameters() if p.requires_grad).register_hook(self._count)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        if self._untimed is None:
            self._stop()
            self._untimed, self._seconds, self._since = self.gradients, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the weights shown."""
        if trainer.is_global_zero:
            evaluations = self.gradients * trainer.world_size
            self.curve[evaluations] = {
                "evaluations": evaluations,
                "epochs": evaluations * self.batch_size / len(self.judge.data.train_indices),
                "seconds": self._seconds,
            } | self.judge.point(pl_module)
            error = self.curve[evaluations]["val_error"]
            if self.keep_best and (self.best is None or error < self.best[0]):
                self.best = (error, {name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock."""
        self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up the gradients and the memory of all replicas and write the curve."""
        self._stop()
        if self.best is not None:
            pl_module.load_state_dict(self.best[1])
        own = [self.gradients, self.gradients - (self._untimed or 0), peak_memory()]
        total, timed, memory = trainer.strategy.reduce(torch.tensor(own, dtype=torch.float64), reduce_op="sum").tolist()
        if trainer.is_global_zero:
            record = {
                "curve": list(self.curve.values()),
                "gradient_evaluations": int(total),
                "seconds": self._seconds,
                "images_per_second": timed * self.batch_size / self._seconds if self._seconds else math.nan,
                "peak_memory_mib": memory,
            }
            write(self.path, lambda file: file.write(json.dumps(record).encode()))

    def _count(self, gradient: Tensor) -> None:
        self.gradients += 1

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._since


def peak_memory() -> float:
    """Return the peak memory of this process in mebibytes: of its GPU, or else of main memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # from kibibytes
