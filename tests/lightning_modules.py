"""Small modules, data and a quiet Trainer for the tests of the callbacks. At module level, so that they pickle."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_entropy as le

BATCHES = 12  # per epoch

# Lightning's own, under the torch that is tested here; not about what we do.
LIGHTNING_WARNINGS = (
    "ignore:.*does not have many workers",
    "ignore:.*no `val_dataloader`",
    "ignore:.*LeafSpec",
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def data(n: int = 4 * BATCHES, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g))


def loader(n: int = 4 * BATCHES, seed: int = 0, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(data(n, seed), batch_size=4, **kwargs)


class Stream:
    """A loader that a checkpoint can resume in the middle of an epoch: Lightning saves and restores its position."""

    def __init__(self, batches: int = BATCHES) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        self.position %= self.batches
        while self.position < self.batches:
            self.position += 1
            yield next(iter(loader(4, seed=self.position)))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Endless(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return iter(data(self.n))


@dataclass(frozen=True)
class Staircase:
    """A schedule that is none of ours."""

    step: float

    def __call__(self, t: int) -> float:
        return self.step * (t + 1)


class Automatic(L.LightningModule):
    """A classifier with automatic optimization."""

    def __init__(self, optimizer: str = "sgd", *, lr: float = 0.1, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) if net is None else net
        self.optimizer, self.lr = optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.optimizer, self.parameters(), self.lr)


class Manual(Automatic):
    """The same with manual optimization."""

    def __init__(self, optimizer: str = "sgd", **kwargs: Any) -> None:
        super().__init__(optimizer, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Pair(Automatic):
    """Two nets against each other, as in a GAN: two optimizers, the second stepping every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, critic = optimizers
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(self.loss(batch) - 0.1 * self.critic(self(batch[0])).mean())
        generator.step()
        self.untoggle_optimizer(generator)
        if batch_idx % 2 == 0:
            self.toggle_optimizer(critic)
            critic.zero_grad()
            self.manual_backward(self.critic(self(batch[0]).detach()).square().mean())
            critic.step()
            self.untoggle_optimizer(critic)

    def configure_optimizers(self) -> Any:
        return [
            make_optimizer("sgd", self.net.parameters(), 0.1),
            make_optimizer("adamw", self.critic.parameters(), 0.01),
        ]


def batchnorm_net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))


def make_optimizer(name: str, params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3),
        "fused": lambda: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True),
        "adamw": lambda: torch.optim.AdamW(params, lr=lr / 10),
    }
    return makers[name]()


CALLBACKS: dict[str, Callable[[], le.InnerOuterCallback]] = {
    "entropy": lambda: le.EntropySGD(5, le.Scoping(0.5, 0.1), 0.01, seed=3),
    "jacobi": lambda: le.HamiltonJacobi(5, le.Scoping(0.5, 0.1), outer_momentum=0.5),
    "pull": lambda: le.EntropySGD(5, le.Pull(0.5), 0.01, outer_momentum=0.5, seed=3),
    "coupled": lambda: le.EntropySGD(5, 0.5, coupled=True, reset_momentum=True, seed=3),
    "adam": lambda: le.EntropySGD(5, 0.5, outer=outer_adam, seed=3),
    "heat": lambda: le.HeatSmoothing(3, 100.0, seed=3),
    "two_timescale": lambda: le.InnerOuterCallback(le.two_timescale(0.5, 0.01), seed=3),
}


def outer_adam(anchors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(anchors, lr=0.01)


def trainer(root: Path | None = None, **kwargs: Any) -> L.Trainer:
    """Make a Trainer that says and writes nothing of its own accord."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "limit_val_batches": 0, "default_root_dir": root,
    }  # fmt: skip
    return L.Trainer(**{**quiet, **kwargs})


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(left: Any, right: Any) -> bool:
    """Compare tensors, lists or dicts of them bit for bit."""
    if isinstance(left, nn.Module):
        left, right = weights(left), weights(right)
    if isinstance(left, dict):
        return list(left) == list(right) and same(list(left.values()), list(right.values()))
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
