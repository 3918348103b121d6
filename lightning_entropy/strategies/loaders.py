"""What replicas see and start from: loaders that end together, BatchNorm inside a replica, weights of their own."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.data import sized_len
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Module


class GroupSyncBatchNorm(TorchSyncBatchNorm):
    """SyncBatchNorm among the ranks of one process group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def apply(self, model: Module) -> Module:
        """Convert every BatchNorm layer."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, self._group)


def even_end(loader: object, limit: int | float | None) -> object:
    """Give a training loader that ends at the same batch on every rank. A collective.

    Args:
        loader: this rank's.
        limit: batches of an epoch at most, or a fraction; the Trainer's ``limit_train_batches``.

    Returns:
        The loader itself, where its length is known; else one that ends when the first rank's does.

    Raises:
        MisconfigurationException: the lengths are known and differ; all ranks raise it.
    """
    length = sized_len(loader)
    if length is not None and limit is not None:
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
    lengths: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, length)
    if None in lengths:
        return EvenEnd(loader)
    if len(set(lengths)) > 1:
        raise MisconfigurationException(
            f"training loaders must have as many batches on every rank, got {lengths} by rank: set limit_train_batches "
            f"to {min(n for n in lengths if n is not None)}, or give every rank as much data"
        )
    return loader


class EvenEnd:
    """A loader that ends when the first rank's does: before every batch the ranks agree that all have one.

    Args:
        loader: of unknown length. Its other attributes are this one's too.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._group: Any = dist.new_group(backend="gloo")

    def __iter__(self) -> Iterator[Any]:
        end = object()
        batches = iter(self._loader)
        while True:
            batch = next(batches, end)
            all_have = torch.tensor(int(batch is not end))
            dist.all_reduce(all_have, dist.ReduceOp.MIN, group=self._group)
            if not all_have:
                return
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


def initialize_apart(module: Module, seed: int) -> None:
    """Draw new weights, by ``reset_parameters`` of the module or else of every submodule with parameters of its own.

    Args:
        module: whose weights. The global random state is left as it was.
        seed: of the draw.

    Raises:
        MisconfigurationException: a submodule with parameters has no such method.
    """
    whole = getattr(module, "reset_parameters", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(whole):
            whole()
            return
        for name, submodule in module.named_modules():
            if next(submodule.parameters(recurse=False), None) is None:
                continue
            reset = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
            if not callable(reset):
                raise MisconfigurationException(
                    f"independent_init needs reset_parameters() of every submodule with parameters, and {name!r} "
                    f"({type(submodule).__name__}) has none: give it one, or give the LightningModule one"
                )
            reset()


def sync_weights(module: Module) -> None:
    """Give all ranks of the world the first's parameters and buffers. A collective."""
    _sync_module_states(module)


def seed_all(seed: int) -> None:
    """Seed every global generator: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """Give the state of torch's generators, from which dropout and shuffling draw."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Go on from :func:`rng_state`."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
