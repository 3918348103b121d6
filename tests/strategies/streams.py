"""Modules whose loader a checkpoint can resume in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.strategies.runs import Net, Samples, data


class Stream:
    """A loader that a checkpoint can resume in the middle of an epoch, a different one on every rank."""

    def __init__(self, batches: int = 8) -> None:
        self.batches, self.position, self.rank = batches, 0, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position %= self.batches
        while self.position < self.batches:
            self.position += 1
            yield data(8, seed=100 * self.rank + self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Resumable(DataLoader[Any]):
    """A DataLoader that resumes after the batches it has yielded; its iterator draws a number, as any does."""

    position = 0

    def __iter__(self) -> Any:
        return self._resume(super().__iter__())

    def _resume(self, batches: Iterator[Any]) -> Iterator[Any]:
        first = self.position % len(self)
        for i, batch in enumerate(batches):
            if i >= first:
                self.position = i + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Loading(Net):
    def train_dataloader(self) -> Any:
        return Resumable(Samples(), self.batch)


class Streaming(Net):
    def train_dataloader(self) -> Any:
        stream = Stream()
        stream.rank = self.trainer.global_rank
        return stream


class Two(Streaming):
    """Two optimizers, the second of which steps every other batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[-1]
        return torch.optim.AdamW(first.parameters(), 0.02), torch.optim.SGD(last.parameters(), 0.1, momentum=0.9)

    def training_step(self, batch: Any, i: int) -> None:
        for k, optimizer in enumerate(self.optimizers()):
            if k == 0 or i % 2:
                self.zero_grad()
                self.manual_backward(super().training_step(batch, i))
                optimizer.step()
