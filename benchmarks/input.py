"""Is the input pipeline fast enough? Images per second with it, over those of the same training on one fixed batch.

``python -m benchmarks.input allcnn --source folder --root data/cifar10`` trains in turns with the pipeline (drawing,
flips, crops, normalisation) and on one fixed batch, and prints the ratio of each pair of turns. It
should be above 0.95.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from benchmarks.command import Options
from recipes.allcnn import AllCNN
from recipes.classifier import Batch, Classifier
from recipes.data import ImageData
from recipes.lenet import LeNet
from recipes.wide_resnet import WideResNet

NETS = {
    "allcnn": AllCNN,
    "allcnn-half": partial(AllCNN, width=48),
    "lenet": LeNet,
    "wrn-16-4": partial(WideResNet, 16, 4),
    "wrn-28-10": partial(WideResNet, 28, 10),
}


class InTurns(ImageData):
    """Alternate the pipeline's batches with one fixed batch, in turns of ``block`` steps.

    Args:
        block: steps of a turn.
        *args: to ``ImageData``.
        **kwargs: to ``ImageData``.
    """

    def __init__(self, block: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block = block
        self.fixed: Batch | None = None
        self.step = 0

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int = 0) -> Batch:
        """Return a new batch in the pipeline's turn, and the fixed one in the other."""
        if self.fixed is None:
            self.fixed = self.materialise(batch)
        turn, self.step = self.step // self.block, self.step + 1
        return self.materialise(batch) if turn % 2 == 0 else self.fixed


class Stopwatch(Callback):
    """Time every turn, including the Trainer's work between its steps.

    Args:
        block: steps of a turn.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start the clock."""
        self._since = _now()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Record the time of a turn that ends."""
        if trainer.global_step % self.block == 0:
            now = _now()
            self.seconds.append(now - self._since)
            self._since = now


def measure(options: argparse.Namespace, data: InTurns) -> list[float]:
    """Return the ratio of each pair of turns: seconds on the fixed batch over seconds with the pipeline."""
    torch.manual_seed(0)
    module = Classifier(
        NETS[options.net](channels=data.shape[0]),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
        channels_last=True,
        compile=options.compile,
    )
    watch = Stopwatch(options.block)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_epochs=-1,
        max_steps=2 * options.block * (options.pairs + 1),
        limit_val_batches=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    # The first pair allocates and compiles.
    with_input, without = watch.seconds[2::2], watch.seconds[3::2]
    images = options.block * options.batch_size
    print(
        f"{images / statistics.median(with_input):.0f} images/s with the pipeline,"
        f" {images / statistics.median(without):.0f} on one batch"
    )
    return [fixed / pipeline for pipeline, fixed in zip(with_input, without, strict=True)]


def main() -> None:
    """Measure from the command line."""
    parser = Options(__doc__)
    parser.add_argument("net", choices=list(NETS), help="to train")
    parser.add_argument("--source", default="random", help="of the images: random, folder, or a data set's name")
    parser.add_argument("--root", default="data", help="folder of the images")
    parser.add_argument("--batch_size", type=int, default=128, help="images of a step")
    parser.add_argument("--normalise", choices=["mean_std", "gcn_zca"], default="mean_std", help="of the pixels")
    parser.add_argument("--precision", default="32-true", help="the Trainer's")
    parser.add_argument("--accelerator", default="auto", help="the Trainer's")
    parser.add_argument("--compile", action="store_true", help="compile the net")
    parser.add_argument("--block", type=int, default=1, help="steps of a turn; more on a GPU, whose steps overlap")
    parser.add_argument("--pairs", type=int, default=40, help="of turns")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = InTurns(
        options.block,
        options.source,
        options.root,
        batch_size=options.batch_size,
        normalise=options.normalise,
        flip=True,
        crop=4,
    )
    data.prepare_data()
    data.setup()
    ratios = sorted(measure(options, data))
    quarter = len(ratios) // 4
    gpu = options.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.net} {options.normalise} {options.precision}: ratio {statistics.median(ratios):.3f}, quartiles"
        f" {ratios[quarter]:.3f} and {ratios[-quarter - 1]:.3f} of {len(ratios)} pairs;"
        f" {device}, torch {torch.__version__}, python {platform.python_version()}"
    )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
