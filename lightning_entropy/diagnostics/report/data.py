"""The examples that a report looks at: drawn once, the same for every checkpoint and section."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_entropy.diagnostics.batches import take_batches
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Layout


class Data:
    """Training and validation batches, and the hooks that move them.

    Args:
        train: A loader or an iterable of batches. None: there is none.
        val: Likewise.
        owner: Whose batch-transfer hooks count, where it overrides them. None: the module's.
        batch_dim: Dimension of the tensors that counts examples. None: that of the one size that they share.
        seed: Of the choice of examples, and of what their data set draws.

    Raises:
        ValueError: If there is neither.

    Example:
        >>> data = Data(train=[torch.zeros(3, 2), torch.ones(3, 2)])
        >>> list(data.splits), [len(batch) for batch in data.batches("train", 4)]
        (['train'], [3, 1])
    """

    def __init__(
        self,
        train: Any = None,
        val: Any = None,
        *,
        owner: Any = None,
        batch_dim: BatchDim = None,
        seed: int = 0,
    ) -> None:
        given = {"train": train, "val": val}
        self.splits = {name: data for name, data in given.items() if data is not None and not _empty(data)}
        if not self.splits:
            raise ValueError("data must have a training or a validation loader, got neither")
        self.owner, self.batch_dim, self.seed = owner, batch_dim, seed
        self._drawn: dict[tuple[str, int], list[Batch]] = {}

    @classmethod
    def of(cls, owner: Any, **options: Any) -> "Data":
        """Take the loaders of a LightningDataModule, set up, or of a LightningModule that has its own."""

        def loader(hook: str) -> Any:
            return _first(getattr(owner, hook)()) if is_overridden(hook, owner) else None

        return cls(loader("train_dataloader"), loader("val_dataloader"), owner=owner, **options)

    def batches(self, split: str, examples: int) -> list[Batch]:
        """Return at most so many examples of a split, in batches, the same ones whenever asked."""
        key = split, examples
        if key not in self._drawn:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                taken = take_batches(self.splits[split], examples, layout=Layout(self.batch_dim), seed=self.seed)
            # Those of the look before will not be asked for again.
            self._drawn = {k: v for k, v in self._drawn.items() if k[0] != split} | {key: taken}
        return self._drawn[key]

    def batch_size(self, split: str) -> int:
        """Return how many examples a batch of a split has; those drawn last tell it where the loader does not."""
        given = getattr(self.splits[split], "batch_size", None)
        if isinstance(given, int):
            return given
        drawn = next((taken for (name, _), taken in self._drawn.items() if name == split), [])
        return max((Layout(self.batch_dim).size(batch) for batch in drawn), default=1)

    def transfer(self, module: pl.LightningModule) -> Callable[[Batch], Batch]:
        """Compose the batch-transfer hooks as a trainer would: the datamodule's where it overrides them."""

        def owner(hook: str) -> Any:
            mine = isinstance(self.owner, pl.LightningDataModule) and is_overridden(hook, self.owner)
            return self.owner if mine else module

        def transfer(batch: Batch) -> Batch:
            batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
            batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, module.device, 0)
            return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)

        return transfer


def _empty(data: Any) -> bool:
    return isinstance(data, list | tuple) and not data


def _first(loaders: Any) -> Any:
    """Return the first of several loaders; a list of batches is one."""
    if isinstance(loaders, dict) and loaders:
        return _first(next(iter(loaders.values())))
    if isinstance(loaders, list | tuple) and loaders and isinstance(loaders[0], DataLoader):
        return loaders[0]
    if isinstance(loaders, CombinedLoader):
        return _first(loaders.iterables)
    return loaders


def is_loader(value: Any) -> bool:
    """Return whether batches can be had from it: a DataLoader, a list of batches or another iterable.

    Example:
        >>> is_loader([torch.zeros(2)]), is_loader(torch.zeros(2)), is_loader("data")
        (True, False, False)
    """
    # An iterator is read once, and a report reads again.
    if hasattr(value, "__next__"):
        return False
    if isinstance(value, Tensor | str | bytes | dict | type):
        return False
    return hasattr(value, "__iter__")
