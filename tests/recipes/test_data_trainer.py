"""The data module under a Trainer: resumed, and shared by ranks."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.data import ImageData


class Seen(L.LightningModule):
    """Write down the labels' images and the pixels' sum of every training batch."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sums = []

    def training_step(self, batch, batch_idx):
        images, _ = batch
        self.sums.append(images.double().sum().item())
        return self.weight.sum() * images.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(seen, data, **changes):
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    trainer = L.Trainer(**arguments | {k: v for k, v in changes.items() if k != "ckpt_path"})
    trainer.fit(seen, datamodule=data, ckpt_path=changes.get("ckpt_path"))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_run_resumed_in_the_middle_of_an_epoch_draws_what_was_left(tmp_path):
    def data():
        return ImageData("random_grey", batch_size=128, flip=True, crop=2, seed=3)

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Seen()
    fit(whole, data(), max_epochs=3, enable_checkpointing=True, callbacks=[every_step])
    assert len(set(whole.sums)) == 12
    for step in (2, 4, 7):
        rest = Seen()
        fit(rest, data(), max_epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest.sums == whole.sums[step:], step


@pytest.mark.filterwarnings("ignore")
def test_replicas_share_an_epoch_as_the_strategy_says():
    data = ImageData("random_grey", batch_size=64)
    data.setup()

    def share(**kwargs):
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)

    whole = next(iter(data.train_dataloader()))
    data.batch_size = 16
    share(num_replicas=4, rank=1)
    part = next(iter(data.train_dataloader()))
    assert torch.equal(part, whole[16:32])
    assert len(data.val_dataloader()) == 1
    assert len(next(iter(data.val_dataloader()))) == 64
    share(num_replicas=1, rank=0, seed=7)
    own = next(iter(data.train_dataloader()))
    assert not torch.equal(own, whole[:16])


@pytest.mark.filterwarnings("ignore")
def test_two_processes_draw_different_images(tmp_path):
    data = ImageData("random_grey", batch_size=32)
    fit(Drawn(str(tmp_path)), data, max_epochs=1, strategy="ddp_fork", devices=2)
    drawn = [np.load(tmp_path / f"{rank}.npy") for rank in (0, 1)]
    assert all(len(rows) == 256 for rows in drawn)
    assert len(np.union1d(*drawn)) == 512, "no image is drawn by both"


class Drawn(Seen):
    """Write down a number for every image that this rank drew, another one for every image."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.rows = []

    def on_train_batch_start(self, batch, batch_idx):
        self.rows.append(batch[0].double().flatten(1) @ torch.arange(784.0, dtype=torch.float64))

    def on_train_end(self):
        np.save(f"{self.folder}/{self.global_rank}.npy", torch.cat(self.rows).numpy())
