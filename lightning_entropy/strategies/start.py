"""What replicas start from: weights, in common or apart; seeds; random states."""

import random

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from lightning_entropy.strategies.lightning_internals import reset_method
from lightning_entropy.strategies.options import Grid


def initialize(module: Module, grid: Grid, seed: int, *, apart: bool) -> None:
    """Start all replicas from rank 0's weights, or each but the first from its own. A collective.

    Args:
        module: whose parameters and buffers are overwritten.
        grid: where this rank stands.
        seed: common to all ranks.
        apart: every replica but the first draws new weights.

    Raises:
        MisconfigurationException: see :func:`initialize_apart`.
    """
    sync_weights(module)
    if apart and grid.replica > 0:
        initialize_apart(module, grid.seed(seed))


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
            reset = reset_method(submodule)
            if reset is None:
                raise MisconfigurationException(
                    f"independent_init needs reset_parameters() of every submodule with parameters, and {name!r} "
                    f"({type(submodule).__name__}) has none: give it one, or give the LightningModule one"
                )
            reset()


def sync_weights(module: Module) -> None:
    """Overwrite parameters and buffers with rank 0's, in one message a device. A collective of the whole world.

    Shards are left as they are: of those rank 0 has its own alone.
    """
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers()) if not isinstance(t, DTensor)]
    for device in dict.fromkeys(t.device for t in tensors):
        here = [t for t in tensors if t.device == device]
        # As bytes: gloo does not know every dtype.
        parts = [t.contiguous().view(-1).view(torch.uint8) for t in here]
        flat = torch.cat(parts)
        dist.broadcast(flat, 0)
        for tensor, part in zip(here, flat.split([part.numel() for part in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # the clone is aligned for the dtype


def seed_apart(grid: Grid, seed: int) -> None:
    """Seed every global generator with the replica's own seed; one process alone keeps the state it has.

    Args:
        grid: where this rank stands. The first replica, if it is one rank, keeps its state too.
        seed: common to all ranks.
    """
    if grid.replica > 0 or grid.data_parallel > 1:
        seed_all(grid.seed(seed))


def seed_all(seed: int) -> None:
    """Seed every global generator: Python's, NumPy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """Return the state of torch's generators, from which dropout and shuffling draw."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restore the state that :func:`rng_state` returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
