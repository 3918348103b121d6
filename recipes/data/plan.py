"""Which image goes into which batch, and how it is augmented: integers, drawn for a whole epoch at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

# The columns of a plan.
INDEX, FLIP, TOP, LEFT = range(4)


class TrainingPlan(Dataset):
    """The batches of one epoch: item b is int64 [batch_size, 4], a row (index, flip, top, left) for each image.

    A function of (seed, epoch, rank, b) and of nothing else. The rows of all ranks together are one plan, of which
    each rank takes its share of every global batch; images that do not fill a last batch wait for another epoch.

    Args:
        indices: the images to draw from, int64 [n].
        batch_size: images in a batch of one rank.
        flip: flip half of the images left to right.
        crop: reflected pixels around an image, of which a window of the image's size is cut: top and left are uniform
            on 0 to 2 * crop.
        replacement: draw every image of every batch uniformly from all of them, instead of each once an epoch.
        seed: integers that name the plan.
        num_replicas: ranks that share an epoch.
        rank: ours, in [0, num_replicas).

    Raises:
        ValueError: if an epoch has no batch for every rank.

    Example:
        >>> plan = TrainingPlan(torch.arange(8), batch_size=4, flip=False, crop=0, replacement=False, seed=(0,))
        >>> sorted(torch.cat([plan[0], plan[1]])[:, INDEX].tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
        self,
        indices: Tensor,
        *,
        batch_size: int,
        flip: bool,
        crop: int,
        replacement: bool,
        seed: tuple[int, ...],
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if len(indices) < batch_size * num_replicas:
            raise ValueError(
                f"batch_size must be at most the images per rank, {len(indices) // num_replicas}, got {batch_size}"
            )
        self.indices = indices
        self.batch_size = batch_size
        self.flip = flip
        self.crop = crop
        self.replacement = replacement
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.indices) // (self.batch_size * self.num_replicas)

    def __getitem__(self, batch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = (self.epoch, self._draw())
        start = (batch * self.num_replicas + self.rank) * self.batch_size
        return self._drawn[1][start : start + self.batch_size]

    def _draw(self) -> Tensor:
        # A generator of our own: neither reads nor moves the global one.
        rng = np.random.default_rng([*self.seed, self.epoch])
        n = len(self) * self.num_replicas * self.batch_size
        available = len(self.indices)
        rows = np.zeros((n, 4), dtype=np.int64)
        order = rng.integers(available, size=n) if self.replacement else rng.permutation(available)[:n]
        rows[:, INDEX] = self.indices.numpy()[order]
        if self.flip:
            rows[:, FLIP] = rng.integers(2, size=n)
        rows[:, TOP : LEFT + 1] = rng.integers(2 * self.crop + 1, size=(n, 2))
        return torch.from_numpy(rows)


class EvaluationPlan(Dataset):
    """Every image once, unaugmented and in order: item b is int64 [at most batch_size, 4].

    The images are dealt to the ranks in turn, and every rank has the same number of batches, so that no rank waits
    for another. No image is repeated: sums over the ranks are exact.

    Args:
        indices: the images, int64 [n].
        batch_size: the most images in a batch.
        crop: the training plan's, whose centre window is the image itself.
        num_replicas: ranks that share the images.
        rank: ours, in [0, num_replicas).

    Raises:
        ValueError: if a rank would have a batch without an image.

    Example:
        >>> EvaluationPlan(torch.arange(5), batch_size=4, num_replicas=2, rank=1)[0][:, INDEX].tolist()
        [1, 3]
    """

    def __init__(
        self, indices: Tensor, *, batch_size: int, crop: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        mine = indices[rank::num_replicas]
        rows = torch.full((len(mine), 4), crop, dtype=torch.int64)
        rows[:, INDEX] = mine
        rows[:, FLIP] = 0
        n_batches = -(-len(indices) // (num_replicas * batch_size))
        if len(indices) // num_replicas < n_batches or not n_batches:
            raise ValueError(f"batch_size must leave an image for each batch of {num_replicas} ranks, got {batch_size}")
        self.batches = rows.tensor_split(n_batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> Tensor:
        return self.batches[batch]


class InOrder(DistributedSampler):
    """Walk a plan, which is already shuffled and already this rank's: batch numbers from ``start`` to the last.

    A ``DistributedSampler`` by type, so that a Trainer leaves it in place and tells it the epoch.
    """

    def __init__(self, plan: Dataset) -> None:
        super().__init__(plan, num_replicas=1, rank=0, shuffle=False)
        self.plan = plan
        self.start = 0
        self.drawn = 0

    def __iter__(self) -> Iterator[int]:
        # Evaluated at the first batch, not at iter(): a Trainer sets epoch and state between the two.
        start, self.start = self.start, 0
        for batch in range(start, len(self.plan)):
            self.drawn = batch + 1
            yield batch

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of another epoch; in the current one, keep the position that was restored."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch
        self.plan.epoch = epoch


class PlanLoader(DataLoader):
    """A DataLoader over a plan whose place in the epoch is saved with a checkpoint.

    A run resumed in the middle of an epoch draws the batches it had left.

    Args:
        dataset: the plan.
        sampler: how to walk it; None is ``InOrder``.
        batch_size: None, as an item is a batch.
        **kwargs: to ``DataLoader``.
    """

    def __init__(self, dataset: Dataset, sampler: Any = None, batch_size: None = None, **kwargs: Any) -> None:
        super().__init__(dataset, sampler=sampler or InOrder(dataset), batch_size=batch_size, **kwargs)

    def __copy__(self) -> PlanLoader:
        # What looks at the batches beside the training, such as a refresh of BatchNorm, must not move its place.
        own = PlanLoader(self.dataset)
        own.sampler.epoch = self.sampler.epoch
        return own

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were drawn."""
        return {"epoch": self.sampler.epoch, "drawn": self.sampler.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in ``state["epoch"]`` after ``state["drawn"]`` batches."""
        self.sampler.set_epoch(state["epoch"])
        self.sampler.start = state["drawn"]
