"""Small networks with known truth, and a LightningModule with its data, for the tests of the diagnostics."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What Lightning says of small runs, and of the torch that it runs on, is not ours to answer.
LIGHTNING_ADVICE = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*treespec, LeafSpec",
        ".*is smaller than the logging interval",
        ".*GPU available but not used",
    )
]


def net(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 4) -> nn.Module:
    """A smooth classifier of 3 classes in 5 inputs: 39 weights by default."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def data(examples: int = 30, batch: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Batches of which the last is smaller, so that weighing each batch alike shows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 5, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (examples,), generator=generator)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def flat_loss(module: nn.Module, batches: list[tuple[Tensor, Tensor]]):
    """The mean cross entropy over all examples as a function of the flat weights, by another road."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]

    def loss(w: Tensor) -> Tensor:
        parts = w.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(module, values, (x,)), y)

    return loss


class Point(nn.Module):
    """Weights alone, for losses given as formulas."""

    def __init__(self, *x: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x, dtype=torch.float64))


class TinyModule(pl.LightningModule):
    """A classifier with BatchNorm and dropout, so that any disturbance of buffers or random states shows."""

    def __init__(self, width: int = 6, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


class TinyData(pl.LightningDataModule):
    """Random points of three classes."""

    def __init__(self, examples: int = 48, batch_size: int = 8) -> None:
        super().__init__()
        self.examples, self.batch_size = examples, batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.examples, 5, generator=generator)
        self.dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, 16)
