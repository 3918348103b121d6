"""Write a net's predictions beside its other results."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from recipes.data.cache import write


class WritePredictions(BasePredictionWriter):
    """Write ``predictions.csv`` into the Trainer's ``log_dir``: a line for every test image.

    Columns: the image's place in the test set, the class predicted, and the probability of every class. With several
    processes each writes its own images, to ``predictions-<rank>.csv``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Tensor],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the file and print its path."""
        classes = trainer.datamodule.classes  # type: ignore[attr-defined]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "predicted", *classes])
        for row, shares in enumerate(torch.cat(list(predictions)).float().cpu()):
            # ImageData deals the images to the ranks in turn.
            image = row * trainer.world_size + trainer.global_rank
            writer.writerow([image, classes[int(shares.argmax())], *(f"{share:.6g}" for share in shares.tolist())])
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.csv"
        path = Path(trainer.log_dir or trainer.default_root_dir) / name
        write(path, lambda file: file.write(text.getvalue().encode()))
        print(f"predictions are in {path}")
