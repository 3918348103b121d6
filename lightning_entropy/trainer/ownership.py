"""Which object drives the loops of a Trainer, and what each such object checks and logs."""

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import Module
from torch.optim import Optimizer

REPLICAS = "elastic_replicas"  # in a checkpoint that a strategy with replicas has saved

_owners: "weakref.WeakKeyDictionary[Trainer, Any]" = weakref.WeakKeyDictionary()


def claim(trainer: Trainer, owner: Any) -> None:
    """Make ``owner`` (a callback or a strategy) the only object that drives the loops of this trainer.

    Raises:
        MisconfigurationException: another object does already; the message says what to remove.
    """
    other = _owners.setdefault(trainer, owner)
    if other is not owner:
        names = f"{type(other).__name__} and {type(owner).__name__}"
        raise MisconfigurationException(
            f"one object can drive the inner and outer loop of a Trainer, got {names}: remove one of them"
        )


def release(trainer: Trainer, owner: Any) -> None:
    """Undo :func:`claim`, unless another object is the owner."""
    if _owners.get(trainer) is owner:
        del _owners[trainer]


def check_optimizers(module: Module | LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a parameter that is in several optimizers: it would have several x.

    Raises:
        MisconfigurationException: with the names of such parameters.
    """
    names = {p: name for name, p in module.named_parameters()}
    counts = Counter(p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    shared = sorted(names.get(p, "?") for p, count in counts.items() if count > 1)
    if shared:
        raise MisconfigurationException(f"a parameter must be in one optimizer, got several for {shared}")
